"""The gateway's own Prometheus metrics under vLLM's base names; owns the registry of its process, knows no request."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.registry import Collector

from llama4_dist.gateway.observe.family import counter, gauge, histogram
from llama4_dist.gateway.observe.merged import Merged
from llama4_dist.stations import BOUNDS_S
from llama4_dist.version import __version__

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PROCESS_NAMESPACE = "llama4_dist_gateway"

BUILD = gauge("build_info", "1, with the version that serves.", "version")
CALLS = counter("rpc_calls", "Finished calls.", "method", "code")
REFUSALS = counter("rpc_errors", "Failed calls.", "method", "reason")
CALL_SECONDS = histogram("rpc_seconds", "Duration of calls that were answered.", LATENCY_BUCKETS_S, "method")
REQUESTS = counter("requests", "Ended generations.", "finish_reason")
IN_FLIGHT = gauge("gateway_requests", "Generations in the gateway.")
STREAMED_TOKENS = counter("streamed_tokens", "Tokens given to clients.")
STREAM_MESSAGES = counter("stream_messages", "Messages they took.")
FIRST_TOKEN = histogram("time_to_first_token_seconds", "From the call to the first token.", LATENCY_BUCKETS_S)
INTER_TOKEN = histogram("inter_token_latency_seconds", "Between two tokens of a stream.", TOKEN_BUCKETS_S)
END_TO_END = histogram("e2e_request_latency_seconds", "From the call to the last token.", LATENCY_BUCKETS_S)
QUEUE = histogram("queue_time_seconds", "From submission to admission.", LATENCY_BUCKETS_S)
# The station after the engine's own: a step's tokens on their way to the streams that carry them.
STREAM = histogram("stream_seconds", "From a step's end to the waking of its last reader.", BOUNDS_S)

GATEWAY_FAMILIES = (
    BUILD, CALLS, REFUSALS, CALL_SECONDS, REQUESTS, IN_FLIGHT, STREAMED_TOKENS, STREAM_MESSAGES, FIRST_TOKEN,
    INTER_TOKEN, END_TO_END, QUEUE, STREAM,
)  # fmt: skip


class Metrics:
    """The gateway's own counters; `collectors` add what others count, at every scrape."""

    def __init__(self, collectors: Iterable[Collector] = ()) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for
        self.registry = registry = CollectorRegistry()
        registry.register(Merged(collectors))
        ProcessCollector(namespace=PROCESS_NAMESPACE, registry=registry)
        BUILD.gauge(registry).labels(__version__).set(1)
        self.calls = CALLS.counter(registry)
        self.refusals = REFUSALS.counter(registry)
        self.call_seconds = CALL_SECONDS.histogram(registry)
        self.requests = REQUESTS.counter(registry)
        self.in_flight: Gauge = IN_FLIGHT.gauge(registry)
        self.streamed_tokens = STREAMED_TOKENS.counter(registry)
        self.stream_messages = STREAM_MESSAGES.counter(registry)
        self.first_token_seconds = FIRST_TOKEN.histogram(registry)
        self.inter_token_seconds = INTER_TOKEN.histogram(registry)
        self.request_seconds = END_TO_END.histogram(registry)
        self.queue_seconds = QUEUE.histogram(registry)
        self.stream_seconds = STREAM.histogram(registry)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """Count a call that was answered."""
        self.calls.labels(method, code).inc()
        self.call_seconds.labels(method).observe(seconds)

    def observe_refusal(self, method: str, code: str, reason: str) -> None:
        """Count a call that failed."""
        self.calls.labels(method, code).inc()
        self.refusals.labels(method, reason).inc()
