"""How long hosts take to answer, and from when on a reply is overdue. It is told times; it reads no clock.

Times are kept per host and per power of two of rows, since a prefill takes longer than a decode step. What is usual is
the lower median over hosts of their 99th percentiles: one slow host does not move it, a slower machine does.
"""

from collections import Counter, deque
from dataclasses import dataclass

WINDOW = 128  # replies remembered per host and size
ENOUGH = 8  # replies of a host before it is believed
CEILING_FACTOR = 2.0  # however slow hosts are, one is given so many times the usual
REFRESH = 32  # replies of a size after which its usual time is computed anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """When a reply is overdue, in seconds or as multiples of the usual reply time (99th percentile).

    After `hedge`, rows are also asked of a replica and the host is avoided for a while; after `lose` its link is given
    up. While nothing is known of a host's times, the `unknown` ones hold: its first rows may wait for a disk. Hosts
    that stood still for a while teach long times: only what is usually longer than `lose_ceiling_s` is waited for
    longer.
    """

    hedge_floor_s: float = 0.05
    hedge_factor: float = 5.0
    lose_floor_s: float = 1.0
    lose_factor: float = 20.0
    lose_ceiling_s: float = 30.0
    unknown_hedge_s: float = 0.25
    unknown_lose_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.hedge_floor_s <= self.lose_floor_s or not 0 < self.unknown_hedge_s <= self.unknown_lose_s:
            raise ValueError(f"a host must be hedged before it is lost, and after more than 0 s: {self}")
        if not self.lose_floor_s <= self.lose_ceiling_s:
            raise ValueError(f"lose_ceiling_s must be at least lose_floor_s: {self}")
        if not 1 <= self.hedge_factor <= self.lose_factor:
            raise ValueError(f"factors must be at least 1, hedge_factor the smaller one: {self}")


class ReplyTimes:
    """Rolling reply times of one attention worker's hosts."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._times: dict[tuple[str, int], deque[float]] = {}  # by host and bit length of the number of rows
        self._usual_s: dict[int, float | None] = {}
        self._num_new: Counter[int] = Counter()

    def observe(self, host: str, num_rows: int, seconds: float) -> None:
        """Note that `host` answered a frame of so many rows after so long."""
        size = num_rows.bit_length()
        times = self._times.get((host, size))
        if times is None:
            times = self._times[host, size] = deque(maxlen=WINDOW)
        times.append(seconds)
        num_new = self._num_new[size] = self._num_new[size] + 1
        if num_new >= REFRESH or (num_new == ENOUGH and self._usual_s.get(size) is None):
            self._num_new[size] = 0
            self._usual_s[size] = self._compute(size)

    def hedge_after_s(self, num_rows: int) -> float:
        """Return from when on a reply of so many rows is asked for elsewhere too."""
        deadlines, usual_s = self._deadlines, self.usual_s(num_rows)
        if usual_s is None:
            return deadlines.unknown_hedge_s
        return max(deadlines.hedge_floor_s, deadlines.hedge_factor * usual_s)

    def lose_after_s(self, num_rows: int) -> float:
        """Return from when on a host that owes such a reply is given up."""
        deadlines, usual_s = self._deadlines, self.usual_s(num_rows)
        if usual_s is None:
            return deadlines.unknown_lose_s
        ceiling_s = max(deadlines.lose_ceiling_s, CEILING_FACTOR * usual_s)
        return max(deadlines.lose_floor_s, min(ceiling_s, deadlines.lose_factor * usual_s))

    def usual_s(self, num_rows: int) -> float | None:
        """Return the usual reply time for so many rows, from the nearest size known; None if nothing is."""
        size = num_rows.bit_length()
        usual_s = self._usual_s.get(size)
        if usual_s is not None:
            return usual_s
        known = {other: seconds for other, seconds in self._usual_s.items() if seconds is not None}
        if not known:
            return None
        smaller = max((other for other in known if other < size), default=None)
        if smaller is None:
            return known[min(known)]
        return known[smaller] * 2.0 ** (size - smaller)

    def _compute(self, size: int) -> float | None:
        """Return the lower median over hosts of their 99th percentiles."""
        known = [times for (_, other), times in self._times.items() if other == size and len(times) >= ENOUGH]
        percentiles = sorted(sorted(times)[int(0.99 * (len(times) - 1))] for times in known)
        return percentiles[(len(percentiles) - 1) // 2] if percentiles else None
