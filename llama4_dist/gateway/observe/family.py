"""One family of metrics: its name, kind, labels and meaning, declared once; knows nobody who counts.

The declarations are the table of docs/observability.md (a test compares them), and what dashboards and alarms may name.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

PREFIX = "llama4_dist_"


class Kind(StrEnum):
    """Prometheus's own words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Counts by bucket, the one above all bounds last, and the sum of what was counted."""

    counts: Sequence[int]
    total: float


@dataclass(frozen=True, slots=True)
class Family:
    """Counters are named without `_total`, which is theirs on the wire; times are seconds, sizes bytes."""

    kind: Kind
    base: str
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()  # upper ones, of a histogram

    @property
    def name(self) -> str:
        """The name as it is scraped."""
        return f"{PREFIX}{self.base}" + ("_total" if self.kind is Kind.COUNTER else "")

    def of(self, *samples: tuple[Sequence[str], float]) -> Metric:
        """Return readings of a counter or a gauge, each with the values of its labels."""
        maker = CounterMetricFamily if self.kind is Kind.COUNTER else GaugeMetricFamily
        metric = maker(PREFIX + self.base, self.meaning, labels=self.labels)
        for values, reading in samples:
            metric.add_metric(values, reading)
        return metric

    def spread(self, samples: Iterable[tuple[Sequence[str], Distribution]]) -> Metric:
        """Return readings of a histogram."""
        metric = HistogramMetricFamily(PREFIX + self.base, self.meaning, labels=self.labels)
        bounds = [*map(floatToGoString, self.bounds), "+Inf"]
        for values, found in samples:
            metric.add_metric(
                values, list(zip(bounds, itertools.accumulate(found.counts), strict=True)), sum_value=found.total
            )
        return metric

    def counter(self, registry: CollectorRegistry) -> Counter:
        """Make a counter that this process moves itself."""
        return Counter(PREFIX + self.base, self.meaning, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        """Make a gauge that this process moves itself."""
        return Gauge(PREFIX + self.base, self.meaning, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """Make a histogram that this process fills itself."""
        return Histogram(PREFIX + self.base, self.meaning, self.labels, buckets=self.bounds, registry=registry)


def counter(base: str, meaning: str, *labels: str) -> Family:
    """Declare a counter."""
    return Family(Kind.COUNTER, base, meaning, labels)


def gauge(base: str, meaning: str, *labels: str) -> Family:
    """Declare a gauge."""
    return Family(Kind.GAUGE, base, meaning, labels)


def histogram(base: str, meaning: str, bounds: Sequence[float], *labels: str) -> Family:
    """Declare a histogram."""
    return Family(Kind.HISTOGRAM, base, meaning, labels, tuple(bounds))
