"""How evenly the hosts of each layer were loaded of late, from readings of their counters; reads none itself."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from cluster.admin.load_rates import LoadReading, rates
from cluster.planning.placement import Pair

WINDOW_S = 30.0
MAX_READINGS = 64


class BalanceWindow:
    """The readings of the last `window_s` and a bit."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._readings: deque[LoadReading] = deque(maxlen=MAX_READINGS)

    def note(self, reading: LoadReading) -> None:
        """Take a reading; those before the window go, but for the last of them."""
        readings = self._readings
        spacing_s = self._window_s / (MAX_READINGS // 2)
        if len(readings) >= 2 and readings[-1].taken_s - readings[-2].taken_s < spacing_s:
            readings.pop()  # many scrapers must not shorten the window
        readings.append(reading)
        while len(readings) > 2 and reading.taken_s - readings[1].taken_s >= self._window_s:
            readings.popleft()

    def balance(self, held_by: Mapping[str, Sequence[Pair]]) -> dict[int, float]:
        """Return by layer the mean load of its hosts over the busiest one's; layers without rows are left out."""
        if len(self._readings) < 2:
            return {}
        loads: dict[int, defaultdict[str, float]] = {}
        for copy in rates(self._readings[0], self._readings[-1], held_by).experts:
            loads.setdefault(copy.pair[0], defaultdict(float))[copy.host] += copy.rows_per_s
        return {
            layer: sum(by_host.values()) / len(by_host) / max(by_host.values())
            for layer, by_host in sorted(loads.items())
            if max(by_host.values()) > 0
        }
