"""A deadline for a test that first shows where every one of our threads stands; ends no process.

A process of ours that calls `show_stacks_on_signal` answers with its Python stacks; of any other the kernel says what
its threads wait for.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

ANSWER_S = 1.0
SIGNAL = signal.SIGUSR1


class DeadlineMissed(AssertionError):
    """The test took too long; the message holds the stacks."""


def show_stacks_on_signal(folder: Path) -> None:
    """Have this process write its threads' stacks into `folder` whenever a watchdog asks."""
    # Kept open for the life of the process: the handler may not open files.
    file = (folder / f"{os.getpid()}.stacks").open("w")
    faulthandler.register(SIGNAL, file=file, all_threads=True)


@contextmanager
def deadline(seconds: float, *, folder: Path | None = None) -> Iterator[None]:
    """Raise DeadlineMissed in the main thread after `seconds`; `folder` is where our processes write stacks."""
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("a deadline interrupts the main thread: enter it there")

    def miss(number: int, frame: FrameType | None) -> NoReturn:
        raise DeadlineMissed(f"not done after {seconds} s\n{stacks(folder)}")

    previous = signal.signal(signal.SIGALRM, miss)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def stacks(folder: Path | None = None) -> str:
    """Return where the threads of this process and its descendants stand."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        shown = [f"process {os.getpid()}, this one: {sys.argv[0]}\n{file.read()}"]
    for child in psutil.Process().children(recursive=True):
        try:
            name = " ".join(" ".join(child.cmdline()).split())[:120]
            answer = asked(child.pid, folder) or waits(child.pid)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
        shown.append(f"process {child.pid}: {name}\n{answer}")
    return "\n".join(shown)


def asked(pid: int, folder: Path | None) -> str:
    """Ask a process for its stacks; "" if it does not answer or never said that it would."""
    path = folder / f"{pid}.stacks" if folder else None
    if path is None or not path.exists() or not handles_signal(pid):
        return ""  # the signal would end it
    already = path.stat().st_size
    os.kill(pid, SIGNAL)
    until_s, seen = time.monotonic() + ANSWER_S, already
    while time.monotonic() < until_s:
        size, seen = seen, path.stat().st_size
        if already < seen == size:
            return path.read_text()[already:]
        time.sleep(0.02)
    return ""


def handles_signal(pid: int) -> bool:
    """Whether a process has a handler for the signal (SigCgt of proc(5))."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (SIGNAL - 1) & 1)


def waits(pid: int) -> str:
    """Return the state of each thread and the kernel function it waits in."""
    lines = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        name, place = (task / "comm").read_text().strip(), (task / "wchan").read_text() or "?"
        lines.append(f"  thread {task.name} {name}: state {state}, waits in {place}")
    return "\n".join(lines)
