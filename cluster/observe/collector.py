"""Collects a cluster's metrics in the driver's process when they are scraped; knows neither Ray nor workers.

One call to the controller a reading, at most one reading a second, however many scrape. While the controller is away
its families are absent, and an age says for how long: nothing stale is shown as if it were of now.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric

from cluster.admin.load_rates import LoadReading
from cluster.control_plane.load_meter import LoadMeter
from cluster.observe import families
from cluster.observe.balance import BalanceWindow
from cluster.reading import ClusterReading
from llama4_dist.gateway.observe.sampled import Sampled

FRESH_S = 1.0
HEAD_FRESH_S = 5.0


class ClusterCollector:
    """A collector of a Prometheus registry. `per_expert` adds a series for each (layer, expert)."""

    def __init__(
        self,
        reading: Callable[[], ClusterReading],
        head_answers: Callable[[], bool],
        *,
        per_expert: bool = False,
        fresh_s: float = FRESH_S,
    ) -> None:
        self._readings = Sampled(reading, fresh_s=fresh_s)
        self._head = Sampled(head_answers, fresh_s=HEAD_FRESH_S)
        self._per_expert = per_expert
        self._meter = LoadMeter()  # here, so that its sums outlive hosts and controllers
        self._balance = BalanceWindow()
        self._noted: ClusterReading | None = None
        self._noting = threading.Lock()

    def describe(self) -> list[Metric]:
        """Name nothing in advance: the cluster may not be up yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Translate one reading."""
        reading = self._readings.read()
        yield families.CONTROLLER_UP.of(((), float(reading is not None)))
        yield families.HEAD_UP.of(((), float(self._head.read() or False)))
        age_s = self._readings.age_s
        yield families.READING_AGE.of(*([] if age_s is None else [((), age_s)]))
        if reading is not None:
            yield from families.cluster_metrics(reading)
            yield from self._of_experts(reading)

    def _of_experts(self, reading: ClusterReading) -> Iterator[Metric]:
        """Translate what takes more than one reading."""
        with self._noting:
            if reading is not self._noted:
                self._noted = reading
                loads = {host.load.host: host.load for host in reading.hosts}
                self._meter.note(tuple(loads.values()))
                self._balance.note(LoadReading(taken_s=time.monotonic(), loads=loads))
            held_by = {one.status.worker: one.status.experts for one in reading.workers if one.status.experts}
            balance, rows = self._balance.balance(held_by), dict(self._meter.rows)
        yield from families.balance_metrics(balance)
        if self._per_expert:
            yield from families.expert_metrics(rows, reading.num_slices)
