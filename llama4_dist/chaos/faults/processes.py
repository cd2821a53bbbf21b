"""Faults of processes: killed and stopped; knows processes by pid, and refuses one that took over a pid."""

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama4_dist.chaos.faults.fault import Fault, FaultNotVerified, must

KILL_TIMEOUT_S = 10.0  # the kernel frees memory before it closes sockets: about 0.3 s a GiB of private pages
CPU_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, told from a later one with the same pid by when it started."""

    pid: int
    started_ticks: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Identify a running process; a pid below 2 and our own are refused."""
        if pid < 2 or pid == os.getpid():
            raise ValueError(f"{pid=} is no process to break: name one that the test started")
        fields = stat_fields(pid)
        if fields is None:
            raise ValueError(f"{pid=} is no running process")
        return cls(pid=pid, started_ticks=int(fields[19]))

    @property
    def state(self) -> str:
        """R, S, D, T, t or Z as in proc(5); "" when it is gone."""
        fields = stat_fields(self.pid)
        return fields[0] if fields and int(fields[19]) == self.started_ticks else ""

    @property
    def is_dead(self) -> bool:
        return self.state in ("", "Z", "X")

    @property
    def thread_states(self) -> str:
        """One letter a thread."""
        tasks = Path(f"/proc/{self.pid}/task")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = [stat_fields(self.pid, f"task/{task.name}/") for task in tasks.iterdir()]
            return "".join(fields[0] for fields in found if fields)
        return ""

    @property
    def cpu_s(self) -> float:
        """Processor seconds used so far by all threads."""
        fields = stat_fields(self.pid)
        return (int(fields[11]) + int(fields[12])) / CPU_TICKS_PER_S if fields else 0.0

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process is gone."""
        if not self.is_dead:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def stat_fields(pid: int, within: str = "") -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on (field 3 of proc(5)); None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/{within}stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


class Kill(Fault):
    """SIGKILL. `restart` starts the process again and returns its pid; without it there is nothing to heal."""

    def __init__(self, pid: int, *, aim: int | None = None, restart: Callable[[], int] | None = None) -> None:
        self.target = Process.of(pid)
        self._aim = Process.of(aim) if aim is not None else self.target
        self._restart = restart
        self.restarted: Process | None = None

    def inject(self) -> None:
        self._aim.send(signal.SIGKILL)

    def verify(self) -> None:
        timeout_s = KILL_TIMEOUT_S if self._aim is self.target else 0.5
        must(lambda: self.target.is_dead, f"process {self.target.pid} is dead", timeout_s=timeout_s)

    def heal(self) -> None:
        if self._restart is not None and self.restarted is None and self.target.is_dead:
            self.restarted = Process.of(self._restart())

    def verify_healed(self) -> None:
        self.verify()
        if self._restart is not None and (self.restarted is None or self.restarted.is_dead):
            raise FaultNotVerified(f"process {self.target.pid} was not replaced by a living one: {self.restarted}")


class Stop(Fault):
    """SIGSTOP, then SIGCONT: the process stands still while its kernel keeps acknowledging what it is sent."""

    def __init__(self, pid: int, *, aim: int | None = None) -> None:
        self.target = Process.of(pid)
        self._aim = Process.of(aim) if aim is not None else self.target

    def inject(self) -> None:
        self._aim.send(signal.SIGSTOP)

    def verify(self) -> None:
        must(lambda: set(self.target.thread_states) == {"T"}, lambda: f"all threads stand still: {self._states()}")

    def heal(self) -> None:
        self._aim.send(signal.SIGCONT)

    def verify_healed(self) -> None:
        must(
            lambda: not self.target.is_dead and not set("Tt") & set(self.target.thread_states),
            lambda: f"every thread runs again: {self._states()}",
        )

    def _states(self) -> str:
        states = "it is dead" if self.target.is_dead else f"states {self.target.thread_states}"
        return f"process {self.target.pid}: {states}"
