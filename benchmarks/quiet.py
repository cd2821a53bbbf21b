"""Tells how much of the processors other processes took while something was timed; such a round is taken again."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil

MAX_SHARE = 0.05  # of all processor time; kernel threads and the clock's own resolution take a few hundredths
PAUSES_S = (0.0, 0.1, 0.3, 1.0, 3.0, 3.0)  # before each try
PATIENCE_S = 10.0  # after which no other try begins

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Processor seconds since the machine started: of everything, idle time included, and of what was busy."""

    total_s: float
    busy_s: float

    @classmethod
    def now(cls) -> "Usage":
        times = psutil.cpu_times()
        total_s = sum(times[:8])  # guests are counted in user time already
        return cls(total_s=total_s, busy_s=total_s - times.idle - getattr(times, "iowait", 0.0))


def processor_seconds(pid: int) -> float:
    """Return the processor seconds of a process and its living children."""
    process = psutil.Process(pid)
    return sum(p.cpu_times().user + p.cpu_times().system for p in (process, *process.children(recursive=True)))


def others_share(before: Usage, after: Usage, own_s: float) -> float:
    """Return which share of all processor time went to anybody else between two readings."""
    total_s = after.total_s - before.total_s
    return max(0.0, after.busy_s - before.busy_s - own_s) / total_s if total_s else 0.0


def undisturbed(
    run: Callable[[], T], pids: tuple[int, ...], *, sleep: Callable[[float], None] = time.sleep
) -> tuple[T, float]:
    """Run until others take little of the processors, a few times at most; return the quietest run and their share."""
    best: tuple[T, float] | None = None
    started = time.monotonic()
    for pause_s in PAUSES_S:
        sleep(pause_s)
        own_s, before = sum(map(processor_seconds, pids)), Usage.now()
        result = run()
        share = others_share(before, Usage.now(), sum(map(processor_seconds, pids)) - own_s)
        if best is None or share < best[1]:
            best = result, share
        if share <= MAX_SHARE or time.monotonic() - started > PATIENCE_S:
            break
    assert best is not None, "tried at least once"
    return best
