"""Prometheus metrics of the gateway under vLLM's base names; owns its registry and knows no request."""

import itertools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from llama4_dist.engine.port import EngineStats
from llama4_dist.errors import Llama4Error
from llama4_dist.stations import BOUNDS_S, buckets

PREFIX = "llama4_dist"
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The gateway's own counters; `stats` supplies the engine's at every scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats))
        self.calls = Counter(f"{PREFIX}_rpc_calls", "Finished calls.", ("method", "code"), registry=self.registry)
        self.refusals = Counter(f"{PREFIX}_rpc_errors", "Failed calls.", ("method", "reason"), registry=self.registry)
        self.call_seconds = Histogram(
            f"{PREFIX}_rpc_seconds",
            "Duration of calls.",
            ("method",),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.requests = Counter(f"{PREFIX}_requests", "Ended generations.", ("finish_reason",), registry=self.registry)
        self.in_flight = Gauge(f"{PREFIX}_gateway_requests", "Generations in the gateway.", registry=self.registry)
        self.streamed_tokens = Counter(f"{PREFIX}_streamed_tokens", "Tokens given to clients.", registry=self.registry)
        self.stream_messages = Counter(f"{PREFIX}_stream_messages", "Messages they took.", registry=self.registry)
        self.first_token_seconds = self._latency("time_to_first_token_seconds", LATENCY_BUCKETS_S)
        self.inter_token_seconds = self._latency("inter_token_latency_seconds", TOKEN_BUCKETS_S)
        self.request_seconds = self._latency("e2e_request_latency_seconds", LATENCY_BUCKETS_S)
        self.queue_seconds = self._latency("queue_time_seconds", LATENCY_BUCKETS_S)
        # The station after the engine's own: a step's tokens on their way to the streams that carry them.
        self.stream_seconds = self._latency("stream_seconds", BOUNDS_S)

    def _latency(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", name.replace("_", " "), buckets=buckets, registry=self.registry)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """Count a call that was answered."""
        self.calls.labels(method, code).inc()
        self.call_seconds.labels(method).observe(seconds)

    def observe_refusal(self, method: str, code: str, reason: str) -> None:
        """Count a call that failed."""
        self.calls.labels(method, code).inc()
        self.refusals.labels(method, reason).inc()


class EngineCollector:
    """Reads the engine's counters when scraped, so that no step pays for metrics."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        """Name nothing in advance: reading the engine at registration would be too early."""
        return []

    def collect(self) -> list[Metric]:
        """Translate one snapshot; an engine that cannot answer is down, and the gateway's own metrics go on."""
        up = GaugeMetricFamily(f"{PREFIX}_engine_up", "whether the engine answers", value=1.0)
        try:
            stats = self._stats()
        except Llama4Error:
            return [GaugeMetricFamily(up.name, up.documentation, value=0.0)]
        used = stats.kv_blocks_total - stats.kv_blocks_free
        gauges = {
            "requests_running": stats.requests_running,
            "requests_waiting": stats.requests_waiting,
            "kv_cache_usage_ratio": used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0,
            "prefix_cache_usage_ratio": (
                stats.kv_blocks_cached / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
            ),
            "queue_age_seconds": stats.max_queue_age_s,
        }
        counters = {
            "engine_steps": stats.steps,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generated_tokens,
            "preemptions": stats.preemptions,
            "prefix_cache_hits": stats.prefix_hits,
            "prefix_cache_tokens": stats.prefix_tokens,
            "prefix_cache_evictions": stats.prefix_evictions,
            "requests_admitted": stats.requests_admitted,
            "requests_finished": stats.requests_finished,
            "requests_cancelled": stats.requests_cancelled,
            "requests_failed": stats.requests_failed,
            "requests_replayed": stats.requests_replayed,
        }
        return [
            up,
            *(GaugeMetricFamily(f"{PREFIX}_{name}", "engine", value=value) for name, value in gauges.items()),
            *(CounterMetricFamily(f"{PREFIX}_{name}", "engine", value=value) for name, value in counters.items()),
            self._by_host("dispatch_rows", {"out": stats.host_rows}),
            self._by_host("dispatch_bytes", {"out": stats.host_bytes_out, "in": stats.host_bytes_in}),
            self._stations(stats),
        ]

    def _by_host(self, name: str, directions: dict[str, object]) -> CounterMetricFamily:
        family = CounterMetricFamily(f"{PREFIX}_{name}", "per expert host", labels=("host", "direction"))
        for direction, values in directions.items():
            for host, value in dict(values).items():  # type: ignore[call-overload]
                family.add_metric((host, direction), value)
        return family

    def _stations(self, stats: EngineStats) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"{PREFIX}_station_seconds", "time of a step by station", labels=("station",))
        for station, seconds in stats.station_seconds.items():
            numbers = itertools.accumulate(buckets(stats.station_steps, station))
            bounds = [*map(floatToGoString, BOUNDS_S), "+Inf"]
            family.add_metric((station,), list(zip(bounds, numbers, strict=True)), seconds)
        return family
