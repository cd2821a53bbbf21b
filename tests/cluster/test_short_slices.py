"""Turns of processes that pass tokens on."""

import subprocess
import sys

import pytest

from cluster.data_plane.short_slices import SLICE_NS, take_short_slices
from tests.scheduling import needs_slices, slice_ns

CODE = """
import os, threading
from cluster.data_plane.short_slices import take_short_slices
from tests.scheduling import slice_ns
go_on, said, ready = threading.Event(), [], threading.Event()

def run():
    ready.set()
    go_on.wait()
    said.append(slice_ns(0))

def start():
    thread = threading.Thread(target=run)
    thread.start()
    return thread

before = start()
ready.wait()
os.nice(3)
assert take_short_slices()
assert os.nice(0) == 3
after = start()
go_on.set()
before.join()
after.join()
print(slice_ns(0), *said)
"""


@needs_slices
def test_threads_there_are_and_those_they_start_have_short_turns_and_keep_their_priority() -> None:
    assert slice_ns(0) > SLICE_NS
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == 3 * [str(SLICE_NS)], done.stderr


def test_another_system_is_left_alone() -> None:
    code = "import platform; platform.machine = lambda: 'other'; "
    code += "from cluster.data_plane.short_slices import take_short_slices; print(take_short_slices())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@needs_slices
def test_a_thread_that_ends_meanwhile_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.listdir", lambda path: ["999999999"])
    assert take_short_slices()
