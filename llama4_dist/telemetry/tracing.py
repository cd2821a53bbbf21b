"""Spans of OpenTelemetry, if this process was told to trace; else nothing, and the package need not be there.

As with logging there is one destination a process, and code anywhere asks for it: `active()`. A span's place in its
trace travels as the W3C `traceparent`, a string, so that what carries it from process to process knows no more.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama4_dist.errors import ConfigError
from llama4_dist.telemetry.settings import Telemetry

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Link, Span

SERVICE = "llama4_dist"
EXPORT_INTERVAL_S = 1.0
FLUSH_TIMEOUT_S = 2.0

Attributes = Mapping[str, str | int | float | bool]
NO_ATTRIBUTES: Attributes = {}

TRACEPARENT_LEN = 55
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class OpenSpan:
    """A span that runs. `traceparent` and `trace_id` are "" where nothing is kept of it."""

    traceparent = ""
    trace_id = ""

    def say(self, attributes: Attributes) -> None:
        """Add what was not known when it began."""

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES, *, after_s: float | None = None) -> None:
        """Note that something happened now, or so many seconds after the span began."""

    def end(self, error: str = "") -> None:
        """End it, once; `error` is the reason why it failed."""


UNTRACED = OpenSpan()


class _Recorded(OpenSpan):
    def __init__(self, span: "Span", traceparent: str, began_ns: int) -> None:
        self._span: Span | None = span
        self._began_ns = began_ns
        self.traceparent = traceparent
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def say(self, attributes: Attributes) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES, *, after_s: float | None = None) -> None:
        if self._span is not None:
            at_ns = None if after_s is None else self._began_ns + round(1e9 * after_s)
            self._span.add_event(name, attributes, timestamp=at_ns)

    def end(self, error: str = "") -> None:
        span, self._span = self._span, None
        if span is not None:
            _end(span, error, None)


class Tracing:
    """Makes spans for one provider."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self._tracer = provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()
        self._api = trace

    def begin(
        self, name: str, parent: str, attributes: Attributes, *, kind: str = "INTERNAL", links: Sequence[str] = ()
    ) -> OpenSpan:
        """Begin a span now. A `parent` that is no `traceparent` begins a trace; what is not sampled costs no more.

        `links` are spans it serves too.
        """
        began_ns = time.time_ns()
        span = self._tracer.start_span(
            name,
            self._context(parent),
            self._api.SpanKind[kind],
            attributes,
            links=self._links(links),
            start_time=began_ns,
        )
        return _Recorded(span, self._traceparent(span), began_ns) if span.is_recording() else UNTRACED

    def record(
        self,
        name: str,
        parent: str,
        seconds: tuple[float, float],
        attributes: Attributes = NO_ATTRIBUTES,
        *,
        events: Sequence[tuple[str, Attributes]] = (),
        error: str = "",
    ) -> str:
        """Record a span that is over, between two moments of the monotonic clock; return its `traceparent`.

        `events` are noted at its end.
        """
        began_ns, ended_ns = map(unix_ns, seconds)
        span = self._tracer.start_span(name, self._context(parent), attributes=attributes, start_time=began_ns)
        for event, said in events:
            span.add_event(event, said, timestamp=ended_ns)
        _end(span, error, ended_ns)
        return self._traceparent(span)

    def flush(self) -> None:
        """Send what was recorded, as far as that goes quickly."""
        self.provider.force_flush(round(1e3 * FLUSH_TIMEOUT_S))

    def _links(self, traceparents: Sequence[str]) -> "list[Link]":
        linked = [self._api.get_current_span(self._context(one)).get_span_context() for one in traceparents]
        return [self._api.Link(context) for context in linked if context.is_valid]

    def _context(self, traceparent: str) -> "Context":
        from opentelemetry.context import Context

        return self._propagator.extract({"traceparent": traceparent}, Context())

    def _traceparent(self, span: "Span") -> str:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span))
        return carrier.get("traceparent", "")


class _Process:
    tracing: Tracing | None = None


def active() -> Tracing | None:
    """Return where this process's spans go; None where it does not trace."""
    return _Process.tracing


def use(tracing: Tracing | None) -> None:
    """Send this process's spans there from now on."""
    _Process.tracing = tracing


def begin(name: str, parent: str, attributes: Attributes, *, kind: str = "INTERNAL") -> OpenSpan:
    """Begin a span if this process traces."""
    tracing = active()
    return UNTRACED if tracing is None else tracing.begin(name, parent, attributes, kind=kind)


def flush() -> None:
    """Send what was recorded."""
    if (tracing := active()) is not None:
        tracing.flush()


def configure_tracing(telemetry: Telemetry, *, instance: str, role: str) -> None:
    """Trace to the collector that the settings name, as this instance; ConfigError where the package is missing."""
    if not telemetry.trace_endpoint:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(f"trace_endpoint needs {error.name}: pip install 'llama4-dist[otel]'") from None
    resource = {"service.name": SERVICE, "service.instance.id": instance, f"{SERVICE}.role": role}
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(telemetry.trace_ratio)), resource=Resource.create(resource)
    )
    secure = telemetry.trace_endpoint.startswith("https://")
    exporter = OTLPSpanExporter(endpoint=telemetry.trace_endpoint, insecure=not secure)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1e3 * EXPORT_INTERVAL_S))
    use(Tracing(provider))


def unix_ns(monotonic_s: float) -> int:
    """Return a moment of this process's monotonic clock on the Unix clock."""
    return time.time_ns() - round(1e9 * (time.monotonic() - monotonic_s))


def _end(span: "Span", error: str, ended_ns: int | None) -> None:
    if error:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, error))
    span.end(ended_ns)


def is_traceparent(text: str) -> bool:
    """Tell whether this is a place in a trace as W3C writes it."""
    return _TRACEPARENT.fullmatch(text) is not None


def is_sampled(traceparent: str) -> bool:
    """Tell whether spans of this parent are kept."""
    return traceparent.endswith(("1", "3", "5", "7", "9", "b", "d", "f"))


def ours(**values: Any) -> Attributes:
    """Name attributes as OpenTelemetry asks for: within a namespace."""
    return {f"{SERVICE}.{name}": value for name, value in values.items()}
