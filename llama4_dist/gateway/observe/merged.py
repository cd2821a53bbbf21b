"""One collector over several that may know series of the same family; Prometheus takes each family once a scrape.

The counters of a worker that is not cut come with its engine, those of a member of an attention group by the
controller: they are the same families.
"""

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class Merged(Collector):
    """Collects from each, and puts the series of one family together."""

    def __init__(self, collectors: Iterable[Collector]) -> None:
        self._collectors = tuple(collectors)

    def describe(self) -> list[Metric]:
        """Name nothing in advance: nobody may be up yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return each family once."""
        found: dict[str, Metric] = {}
        for collector in self._collectors:
            for family in collector.collect():
                first = found.setdefault(family.name, family)
                if first is not family:
                    first.samples += family.samples
        return found.values()
