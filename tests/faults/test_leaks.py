"""Whatever a test could leave behind is found and named; what comes and goes is not."""

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import shared_memory
from typing import Any

import pytest
import ray

from cluster.driver.launch import ensure_ray
from tests.faults.leaks import Leaked, assert_no_leaks, new_since, snapshot
from tests.faults.victims import victim


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests on this machine share the usual one."""
    with tempfile.TemporaryDirectory(prefix="leaks-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@contextmanager
def thread() -> Iterator[None]:
    stop = threading.Event()
    one = threading.Thread(target=stop.wait, name="forgotten thread")
    one.start()
    yield
    stop.set()
    one.join()


@contextmanager
def pipe() -> Iterator[None]:
    ends = os.pipe()
    yield
    for end in ends:
        os.close(end)


@contextmanager
def listener() -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)):
        yield


@contextmanager
def unix_socket() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX):
        yield


@contextmanager
def shared() -> Iterator[None]:
    memory = shared_memory.SharedMemory(create=True, size=64)
    yield
    memory.close()
    memory.unlink()


@contextmanager
def zombie() -> Iterator[None]:
    with victim() as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield


@contextmanager
def open_file() -> Iterator[None]:
    with tempfile.NamedTemporaryFile(suffix="open-file"):
        yield


LEFT: dict[str, Callable[[], object]] = {
    r"process \d+ .*threading.Event": victim,
    "zombie": zombie,
    "thread forgotten thread": thread,
    "descriptor pipe of .* x2": pipe,
    r"socket AF_INET SOCK_STREAM LISTEN at .*127\.0\.0\.1": listener,
    "socket AF_UNIX": unix_socket,
    "shared memory /dev/shm/psm_": shared,
    "temporary .*llama4-left": lambda: tempfile.TemporaryDirectory(prefix="llama4-left-"),
    "descriptor .*open-file": open_file,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_named_and_forgiven_once_gone(name: str) -> None:
    with victim():  # multiprocessing and others start their helpers on first use; not what is looked for
        shared_memory.SharedMemory(create=True, size=1).unlink()
    before = snapshot()
    with ExitStack() as things:
        things.enter_context(LEFT[name]())  # type: ignore[arg-type]
        with pytest.raises(Leaked, match=name):
            assert_no_leaks(before, grace_s=0.0)
    assert_no_leaks(before, grace_s=2.0)


def test_what_goes_within_its_grace_is_no_leak() -> None:
    before = snapshot()
    leaving = threading.Timer(0.2, lambda: None)
    leaving.start()
    with pytest.raises(Leaked, match="Thread-"):
        assert_no_leaks(before, snapshot())
    assert_no_leaks(before, grace_s=5.0)


def test_a_process_left_behind_is_one_line() -> None:
    before = snapshot()
    with victim() as process:
        left = [line for line in new_since(before, snapshot()) if str(process.pid) in line]
        assert len(left) == 1


def test_a_socket_in_place_of_another_is_no_leak() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = socket.create_connection(server.getsockname())
        before = snapshot()
        second = socket.create_connection(server.getsockname())
        first.close()
        assert new_since(before, snapshot()) == []
        third = socket.create_connection(server.getsockname())
        assert len(new_since(before, snapshot())) == 1
        second.close()
        third.close()


def test_patterns_excuse_what_libraries_keep() -> None:
    before = snapshot()
    with thread():
        assert_no_leaks(before, grace_s=0.0, ignore=["thread forgotten*"])


def test_a_file_of_another_name_is_not_ours() -> None:
    before = snapshot()
    with tempfile.TemporaryDirectory(prefix="somebody-else-"):
        assert_no_leaks(before, grace_s=0.0)


@pytest.mark.ray
def test_actors_groups_and_daemons_of_ray_are_found() -> None:
    session = ensure_ray(None)
    try:
        before = snapshot()

        class Forgotten:
            """An actor that does nothing."""

        actor: Any = ray.remote(Forgotten).remote()
        ray.get(actor.__ray_ready__.remote())
        group = ray.util.placement_group([{"CPU": 1}], name="forgotten-group")
        ray.get(group.ready())
        with pytest.raises(Leaked, match=r"Ray actor .*Forgotten[\s\S]*placement group forgotten-group"):
            assert_no_leaks(before, grace_s=0.0)
        ray.kill(actor)
        ray.util.remove_placement_group(group)
        assert_no_leaks(before, grace_s=10.0, ignore=["process*", "thread*", "descriptor*", "shared memory*"])
    finally:
        session.close()
