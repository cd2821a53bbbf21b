"""An attention worker's service in a process of its own, so that a test can kill or stop it."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

SECRET = b"w" * 32


class ServingProcess:
    """A process that prints where it serves; it boots on while nobody asks for its `address`."""

    def __init__(self, module: str, *arguments: object) -> None:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @cached_property
    def address(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)
        if number is signal.SIGKILL:
            self._process.wait(60)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def spawn_worker(*, step_s: float = 0.01, ttl_s: float = 60.0, port: int = 0) -> ServingProcess:
    """Start a worker whose fake model takes `step_s` for a step."""
    return ServingProcess("tests.rpc.serve_engine", step_s, ttl_s, port, SECRET.decode())


@contextmanager
def worker_process(*, step_s: float = 0.01, ttl_s: float = 60.0, port: int = 0) -> Iterator[ServingProcess]:
    """Serve while inside."""
    process = spawn_worker(step_s=step_s, ttl_s=ttl_s, port=port)
    try:
        yield process
    finally:
        process.close()


class Spares:
    """Processes that boot while tests run, so that no test waits for its own."""

    def __init__(self, spawn: Callable[[], ServingProcess], count: int) -> None:
        self._spawn = spawn
        self._spares = deque(spawn() for _ in range(count))
        self._all = list(self._spares)
        self._count = count

    def take(self) -> ServingProcess:
        """Give one away and let the next one boot."""
        while len(self._spares) <= self._count:
            self._spares.append(self._spawn())
            self._all.append(self._spares[-1])
        return self._spares.popleft()

    def give_back(self, process: ServingProcess) -> None:
        """Take one back that a test has not killed."""
        if process.lives:
            self._spares.appendleft(process)

    def close(self) -> None:
        for process in self._all:
            process.close()
