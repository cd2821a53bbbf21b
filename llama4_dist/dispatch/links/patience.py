"""How long to look again before sleeping: to be woken costs more than a small frame. Knows neither links nor frames.

A thread that sleeps is woken through the scheduler and often through a halted core, which takes 10 to 15 microseconds
and leaves cold caches. Where the answer comes sooner than that, looking costs less processor time than sleeping.
"""

import os
import time
from collections.abc import Callable

LOOK_S = 200e-6  # as long as a host may take for a small batch and its two ways
_SLEEPS_ON_BUSY_CORE = 64

Events = list[tuple[int, int]]


class Patience:
    """Looks again and again for up to `look_s` before it sleeps, as long as waits are that short.

    After a longer wait the next one sleeps at once, until one was short again. Each look lets other threads of this
    core run first, so that a peer on the same core is not held up; where one took the core for long, looking does not
    pay and many waits sleep.
    """

    def __init__(self, look_s: float = LOOK_S, clock: Callable[[], float] = time.perf_counter) -> None:
        self._look_s = look_s
        self._clock = clock
        self._num_sleeps = 0  # waits that still sleep at once

    def wait(self, poll: Callable[[float], Events], timeout_s: float) -> Events:
        """Return what `poll(seconds)` returns as soon as it is not empty, or after `timeout_s`."""
        began = self._clock()
        if self._num_sleeps == 0:
            events = self._look(poll, began, began + min(self._look_s, timeout_s))
            if events or timeout_s <= self._look_s:
                return events
            timeout_s -= self._look_s
        events = poll(timeout_s)
        if self._clock() - began > self._look_s:
            self._num_sleeps = max(self._num_sleeps, 1)
        else:
            self._num_sleeps = max(self._num_sleeps - 1, 0)
        return events

    def _look(self, poll: Callable[[float], Events], looked: float, until: float) -> Events:
        while looked < until:
            events = poll(0.0)
            if events:
                return events
            os.sched_yield()
            now = self._clock()
            if now - looked > self._look_s:
                self._num_sleeps = _SLEEPS_ON_BUSY_CORE
            looked = now
        return poll(0.0)
