"""What every process of a deployment is told about its logs and traces; plain, so that it can be sent to a worker."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """`log_format` is text or json. `trace_endpoint` is an OTLP collector's URL, "" for no traces.

    Of traces that begin here a share of `trace_ratio` is kept; of those that a caller began, what the caller decided.
    """

    log_level: str = "info"
    log_format: str = "text"
    trace_endpoint: str = ""
    trace_ratio: float = 1.0


DEFAULT = Telemetry()
