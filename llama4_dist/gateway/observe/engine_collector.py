"""Reads the counters of engines when they are scraped, so that no step pays for metrics."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from prometheus_client.core import Metric

from llama4_dist.engine.port import Engine, EngineOfMany, EngineStats, stats_by_worker
from llama4_dist.gateway.observe.engine_families import ENGINES, engine_metrics
from llama4_dist.gateway.observe.sampled import Sampled


class EngineReading(NamedTuple):
    """Counters by worker, and replays by the worker that was lost."""

    stats: Mapping[str, EngineStats | None]
    replays: Mapping[str, int]


class EngineCollector:
    """A collector of a Prometheus registry over one engine port, be it one engine or a cluster's."""

    def __init__(self, engine: Engine) -> None:
        self._readings = Sampled(lambda: read_engines(engine))

    def describe(self) -> list[Metric]:
        """Name nothing in advance: reading the engine at registration would be too early."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Translate one reading; where there is none, no engine answers, and the gateway's own metrics go on."""
        reading = self._readings.read()
        return [ENGINES.of(((), 0.0))] if reading is None else engine_metrics(*reading)


def read_engines(engine: Engine) -> EngineReading:
    """Ask every engine."""
    replays = engine.replays() if isinstance(engine, EngineOfMany) else {}
    return EngineReading(stats_by_worker(engine), replays)
