"""Measured load of each (layer, expert), from readings of the hosts' counters. It reads none itself, and no clock."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

from cluster.operation import HostLoad
from cluster.planning.loads import ExpertLoads
from cluster.planning.placement import ExpertGeometry, Pair

ENOUGH_ROWS = 1000  # below that chance speaks
HORIZON_S = 600.0  # how long loads are expected to stay as they are
BYTES_PER_S = 1e9  # at which a host maps and warms experts; measured ones are not known before the first change


class Prices(TypedDict):
    """Arguments of `balance.worth_moving`."""

    seconds_per_row: float
    horizon_s: float
    bytes_per_s: float
    rows_per_s: float


class LoadMeter:
    """Sums counters over hosts and their lives. A reading of a host that began anew counts from zero."""

    def __init__(self) -> None:
        self._last: dict[str, HostLoad] = {}
        self._rows: Counter[Pair] = Counter()
        self._compute_s = 0.0
        self._seen_rows = 0  # those between two readings of one host
        self._seen_s: dict[str, float] = {}  # time between readings, by host: each has a clock of its own

    def note(self, readings: Sequence[HostLoad]) -> None:
        """Add what hosts computed since their reading before."""
        for load in readings:
            before = self._last.get(load.host)
            self._last[load.host] = load
            if before is None or before.incarnation != load.incarnation:
                self._rows.update(load.rows)
                self._compute_s += load.compute_s
                continue
            rows = {pair: num - before.rows.get(pair, 0) for pair, num in load.rows.items()}
            self._rows.update(rows)
            self._compute_s += load.compute_s - before.compute_s
            self._seen_rows += sum(rows.values())
            self._seen_s[load.host] = self._seen_s.get(load.host, 0.0) + load.at_s - before.at_s

    @property
    def rows(self) -> Mapping[Pair, int]:
        """Rows by (layer, expert), over all hosts and their lives: these only grow."""
        return self._rows

    def loads(self, geometry: ExpertGeometry) -> ExpertLoads:
        """Return measured loads, or equal ones until enough rows were seen."""
        if self._rows.total() < ENOUGH_ROWS:
            return ExpertLoads.uniform(geometry)
        return ExpertLoads(rows={pair: float(rows) for pair, rows in self._rows.items()})

    def prices(self) -> Prices:
        """Return what moving costs and saves, as measured; a rate needs two readings of a host."""
        rows, seconds = self._rows.total(), max(self._seen_s.values(), default=0.0)
        return Prices(
            seconds_per_row=self._compute_s / rows if rows else 0.0,
            horizon_s=HORIZON_S,
            bytes_per_s=BYTES_PER_S,
            rows_per_s=self._seen_rows / seconds if seconds > 0 else 0.0,
        )
