"""An OTLP collector: takes the spans that any process sends, over the real protocol."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.waiting import wait_until


@dataclass(frozen=True, kw_only=True)
class Span:
    """One span and who sent it; attributes without the project's prefix."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    instance: str
    seconds: float
    attributes: Mapping[str, Any]
    events: tuple[tuple[str, Mapping[str, Any]], ...]
    links: tuple[str, ...]
    failed: bool


@dataclass
class Collected(trace_service_pb2_grpc.TraceServiceServicer):
    """What has come so far."""

    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self.lock:
            for resource in request.resource_spans:
                instance = plain(resource.resource.attributes)["service.instance.id"]
                for scope in resource.scope_spans:
                    self.spans += [read(span, instance) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace: str, name: str) -> list[Span]:
        """Return the spans of that name in a trace."""
        with self.lock:
            return [span for span in self.spans if span.trace_id == trace and span.name == name]

    def wait_for(self, trace: str, *names: str) -> None:
        """Wait until a trace has spans of all these names."""
        wait_until(
            lambda: all(self.of(trace, name) for name in names),
            lambda: f"{names} are to come, have {sorted({span.name for span in self.spans})}",
        )


def read(span: Any, instance: str) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        instance=instance,
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        attributes=plain(span.attributes),
        events=tuple((event.name, plain(event.attributes)) for event in span.events),
        links=tuple(link.span_id.hex() for link in span.links),
        failed=span.status.code == 2,
    )


def plain(attributes: Any) -> dict[str, Any]:
    return {
        pair.key.removeprefix("llama4_dist."): getattr(pair.value, pair.value.WhichOneof("value"))
        for pair in attributes
    }


@contextmanager
def collecting() -> Iterator[Collected]:
    """Collect while inside."""
    collected = Collected()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collected, server)
    collected.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collected
    finally:
        server.stop(0)
