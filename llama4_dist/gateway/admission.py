"""Decides whether a call may enter: bounds on calls in the gateway and on their wait; a drain lets none in."""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from llama4_dist.errors import OverloadedError, UnavailableError
from llama4_dist.gateway.queue_wait import QueueWait

MIN_RETRY_S = 0.05
MAX_RETRY_S = 30.0
SMOOTHING = 0.1  # weight of the newest interval between two finished calls


MEMORY_S = 10.0  # of the measured pace, where no max_queue_s says how far ahead is looked
BURST = 0.25  # of max_queue_s: while the oldest has waited less, a queue may be a burst that one step takes in


class Admission:
    """Counts calls in flight; used from the event loop only. `clock` returns monotonic seconds.

    With `max_queue_s`, a call that would wait longer than that for its first token is refused at once: it would miss
    its aim, and make those after it miss theirs.
    """

    def __init__(self, max_requests: int, clock: Callable[[], float], *, max_queue_s: float | None = None) -> None:
        self.max_requests = max_requests
        self._max_queue_s = math.inf if max_queue_s is None else max_queue_s
        self._queue = QueueWait(max_queue_s or MEMORY_S, clock)
        self.in_flight = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._clock = clock
        self._interval_s = MIN_RETRY_S
        self._last_exit_s: float | None = None
        self._refused_since_exit = 0

    @contextmanager
    def enter(self) -> Iterator[Callable[[], None]]:
        """Hold a place while the call runs, or raise as `check` does.

        What it yields is to be called when the first token is there, and does nothing after the first time.
        """
        self.check()
        self.in_flight += 1
        self.idle.clear()
        place = object()
        self._queue.join(place)
        try:
            yield partial(self._queue.begin, place)
        finally:
            self._queue.leave(place)
            self._exit()

    def check(self) -> None:
        """Raise OverloadedError, or UnavailableError (reason DRAINING), if a call that came now could not enter."""
        if self.draining:
            raise UnavailableError("the server is shutting down; try another one", reason="DRAINING", retry_after_s=1.0)
        if self.in_flight >= self.max_requests:
            raise self.overloaded(f"{self.in_flight} requests are in flight, the limit is {self.max_requests}")
        expected_s = self._queue.expected_s
        if expected_s > self._max_queue_s and self._queue.oldest_s > BURST * self._max_queue_s:
            raise self.overloaded(f"the wait would be {expected_s:.1f} s, the limit is {self._max_queue_s} s")

    def overloaded(self, why: str) -> OverloadedError:
        """Build a refusal; callers refused in a row are told times one finish apart, so they do not return together."""
        self._refused_since_exit += 1
        wait_s = min(max(self._interval_s * self._refused_since_exit, MIN_RETRY_S), MAX_RETRY_S)
        return OverloadedError(f"{why}; retry in {wait_s:.2f} s", retry_after_s=wait_s)

    def _exit(self) -> None:
        self.in_flight -= 1
        now_s = self._clock()
        if self._last_exit_s is not None:
            self._interval_s += SMOOTHING * (now_s - self._last_exit_s - self._interval_s)
        self._last_exit_s = now_s
        self._refused_since_exit = 0
        if self.in_flight == 0:
            self.idle.set()
