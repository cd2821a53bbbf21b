"""Decides whether a call may enter: a bound on calls in the gateway, and a drain that lets none in."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama4_dist.errors import OverloadedError, UnavailableError

MIN_RETRY_S = 0.05
MAX_RETRY_S = 30.0
SMOOTHING = 0.1  # weight of the newest interval between two finished calls


class Admission:
    """Counts calls in flight; used from the event loop only. `clock` returns monotonic seconds."""

    def __init__(self, max_requests: int, clock: Callable[[], float]) -> None:
        self.max_requests = max_requests
        self.in_flight = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._clock = clock
        self._interval_s = MIN_RETRY_S
        self._last_exit_s: float | None = None
        self._refused_since_exit = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Hold a place while the call runs; raise OverloadedError or UnavailableError (reason DRAINING)."""
        if self.draining:
            raise UnavailableError("the server is shutting down; try another one", reason="DRAINING", retry_after_s=1.0)
        if self.in_flight >= self.max_requests:
            raise self.overloaded(f"{self.in_flight} requests are in flight, the limit is {self.max_requests}")
        self.in_flight += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._exit()

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
