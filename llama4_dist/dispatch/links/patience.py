"""How long to look again before sleeping: to be woken costs more than a small frame. Knows neither links nor frames.

A thread that sleeps is woken through the scheduler and often through a halted core, which takes 10 to 15 microseconds
and leaves cold caches. Where the answer comes sooner than that, looking costs less processor time than sleeping.
"""

import os
import select
import time
from collections.abc import Callable
from functools import partial

from llama4_dist.native.extension import extension

LOOK_S = 200e-6  # as long as a host may take for a small batch and its two ways
_SLEEPS_ON_BUSY_CORE = 64

Events = list[tuple[int, int]]


Poll = Callable[[float], Events]
Look = Callable[[float, float], tuple[Events, bool]]  # (seconds, longest) to (events, whether one look took longer)


class Patience:
    """Looks again and again for up to `look_s` before it sleeps, as long as waits are that short.

    After a longer wait the next one sleeps at once, until one was short again. Each look lets other threads of this
    core run first, so that a peer on the same core is not held up; where one took the core for long, looking does not
    pay and many waits sleep.
    """

    def __init__(
        self, poll: Poll, look: Look, look_s: float = LOOK_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._poll = poll
        self._look = look
        self._look_s = look_s
        self._clock = clock
        self._num_sleeps = 0  # waits that still sleep at once

    @property
    def look_s(self) -> float:
        """How long a wait would look; 0 = it would sleep at once."""
        return 0.0 if self._num_sleeps else self._look_s

    def lost_core(self) -> None:
        """Note that looking took much longer than it should have: others need this core."""
        self._num_sleeps = _SLEEPS_ON_BUSY_CORE

    def wait(self, timeout_s: float, has_looked: bool = False) -> Events:
        """Return what `poll(seconds)` returns as soon as it is not empty, or after `timeout_s`."""
        look_s, is_short = self._look_s, False
        if has_looked:
            pass
        elif self._num_sleeps == 0:
            events, lost_core = self._look(min(look_s, timeout_s), look_s)
            if lost_core:
                self.lost_core()
            if events or timeout_s <= look_s:
                return events
            timeout_s -= look_s
        else:
            is_short = True
        began = self._clock()
        events = self._poll(timeout_s)
        if is_short and self._clock() - began <= look_s:
            self._num_sleeps -= 1
        else:
            self._num_sleeps = max(self._num_sleeps, 1)
        return events


def patience(epoll: select.epoll) -> Patience:
    """Return the patience to wait on these descriptors with."""
    native = extension()
    return Patience(epoll.poll, looking(epoll.poll) if native is None else partial(native.look, epoll.fileno()))


def looking(poll: Poll, clock: Callable[[], float] = time.perf_counter) -> Look:
    """Return what `native.look` does."""

    def look(seconds: float, longest_s: float) -> tuple[Events, bool]:
        began = looked = clock()
        is_late = False
        while True:
            events = poll(0.0)
            if events or looked - began >= seconds:
                return events, is_late
            os.sched_yield()
            now = clock()
            is_late |= now - looked > longest_s
            looked = now

    return look
