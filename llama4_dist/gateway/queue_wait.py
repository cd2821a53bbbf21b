"""How long a new request would wait for its first token, from what the requests before it do; knows no engine.

Little's law: the requests that wait, divided by the rate at which waiting ones begin. That rate is measured only while
somebody waits, since without a queue it is the rate of arrivals; what lies more than `memory_s` back is forgotten.
"""

import math
from collections.abc import Callable, Hashable


class QueueWait:
    """Requests between their arrival and their first token, oldest first. `clock` returns monotonic seconds."""

    def __init__(self, memory_s: float, clock: Callable[[], float]) -> None:
        self._memory_s = memory_s
        self._clock = clock
        self._arrivals_s: dict[Hashable, float] = {}
        self._num_begun = 0.0  # both decay alike, so their quotient is a rate
        self._busy_s = 0.0
        self._counted_until_s = clock()

    def join(self, request: Hashable) -> None:
        """Add a request at the end."""
        self._arrivals_s[request] = self._count()

    def begin(self, request: Hashable) -> None:
        """Take out a request that has its first token; once is enough."""
        self._count()
        if self._arrivals_s.pop(request, None) is not None:
            self._num_begun += 1.0

    def leave(self, request: Hashable) -> None:
        """Take out a request that ended, if it never began."""
        self._count()
        self._arrivals_s.pop(request, None)

    @property
    def oldest_s(self) -> float:
        """How long the first of the queue has waited; 0 without a queue."""
        return self._clock() - next(iter(self._arrivals_s.values())) if self._arrivals_s else 0.0

    @property
    def expected_s(self) -> float:
        """How long one that came now would wait; infinite while none has begun."""
        self._count()
        if not self._arrivals_s:
            return 0.0
        return len(self._arrivals_s) * self._busy_s / self._num_begun if self._num_begun > 1e-9 else math.inf

    def _count(self) -> float:
        now_s = self._clock()
        passed_s, self._counted_until_s = now_s - self._counted_until_s, now_s
        if self._arrivals_s:
            kept = math.exp(-passed_s / self._memory_s)
            self._num_begun *= kept
            self._busy_s = self._busy_s * kept + passed_s
        return now_s
