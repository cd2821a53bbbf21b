"""A missed deadline shows where every process of ours stands, and a kept one shows nothing."""

import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.victims import victim
from tests.faults.watchdog import DeadlineMissed, deadline

ROOT = Path(__file__).parents[2]
ANSWERS = """
import sys, threading
sys.path[:0] = [{root!r}, *{path!r}]
from pathlib import Path
from tests.faults.watchdog import show_stacks_on_signal
show_stacks_on_signal(Path({folder!r}))
def stuck_for_ever():
    threading.Event().wait()
threading.Thread(target=stuck_for_ever, daemon=True).start()
print("registered", flush=True)
stuck_for_ever()
"""


def wait_in_vain() -> None:
    threading.Event().wait(20)


def test_a_missed_deadline_shows_the_stacks_of_all_our_processes(tmp_path: Path) -> None:

    path = [str(Path(psutil.__file__).parents[1])]
    answering = victim(ANSWERS.format(root=str(ROOT), path=path, folder=str(tmp_path)))
    with answering as one, victim() as silent:
        assert one.stdout is not None
        assert one.stdout.readline() == b"registered\n"
        with pytest.raises(DeadlineMissed) as caught, deadline(0.2, folder=tmp_path):
            wait_in_vain()
        text = str(caught.value)
        assert "wait_in_vain" in text
        assert text.count("in stuck_for_ever") == 2
        assert f"process {silent.pid}" in text
        assert "state S, waits in" in text
        assert one.poll() is None, "it was asked, not killed"
        assert silent.poll() is None, "it has no handler, so no signal was sent"


def test_a_kept_deadline_leaves_no_timer(tmp_path: Path) -> None:
    with deadline(0.05):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_deadline_in_another_thread_is_refused() -> None:
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with deadline(1.0):
                pass
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(60)
    assert "main thread" in str(caught[0])


def test_a_deadline_interrupts_at_once() -> None:
    begun_s = time.monotonic()
    with pytest.raises(DeadlineMissed), deadline(0.1):
        wait_in_vain()
    assert time.monotonic() - begun_s < 5
