"""The one clock of a simulated world. It passes when somebody waits; who asks on and on without waiting is stuck."""

from collections.abc import Callable

SPIN = 20_000  # questions for the time between two of its steps
FIRST_NAP_S = 0.001
LONGEST_NAP_S = 0.05


class Stuck(BaseException):
    """Somebody waits for what never comes; not an Exception, so that no handler takes it for a failed step."""


class Clock:
    """Satisfies `links.link.Clock` and what else is used of the module `time`. `on_sleep` runs when a step waits."""

    def __init__(self, on_sleep: Callable[[], None]) -> None:
        self.now = 1000.0
        self.deadline: float | None = None  # a step that waits beyond it is stuck
        self._on_sleep = on_sleep
        self._num_asked = 0
        self._nap_s = FIRST_NAP_S

    def monotonic(self) -> float:
        self._num_asked += 1
        if self._num_asked > SPIN:
            raise Stuck("the time was asked for again and again, and nobody waited")
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)

    def sleep(self, seconds: float, /) -> None:
        """Wait within a step, longer each time: who polls a thousand times a second for 10 s takes too long here."""
        self.advance(max(seconds, self._nap_s))
        self._nap_s = min(LONGEST_NAP_S, 1.5 * self._nap_s)
        if self.deadline is not None and self.now > self.deadline:
            raise Stuck("a step waits beyond every deadline")
        self._on_sleep()

    def wake(self) -> None:
        """Something happened: the next waits are short again."""
        self._nap_s = FIRST_NAP_S

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self._num_asked = 0
