"""Spans of an engine's requests, and now and then of a step that served one; made when they are over.

Nothing is held open while tokens are made, and only for requests whose caller traces is anything made at all. A step's
span says how long each station and each expert host took: at most one a second, since all steps of a moment are alike.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.engine.plan import PlannedSpan
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.request import FinishReason
from llama4_dist.stations import NAMES, Stations
from llama4_dist.telemetry.tracing import Tracing, is_sampled, ours

STEP_INTERVAL_S = 1.0
MAX_LINKS = 32


class Before(NamedTuple):
    """What the counters said when a step began."""

    began_s: float
    reply_seconds: dict[str, float]
    rows_out: dict[str, int]


class RequestTraces:
    """One engine's; called by its thread only."""

    def __init__(
        self, tracing: Tracing, *, stations: Stations, traffic: DispatchStats, clock: Callable[[], float]
    ) -> None:
        self._tracing = tracing
        self._stations = stations
        self._traffic = traffic
        self._clock = clock
        self._next_step_s = 0.0

    def note_first_token(self, sequence: SequenceState) -> None:
        """Remember when prefill was over."""
        if is_sampled(sequence.request.trace):
            sequence.first_token_s = self._clock()

    def end(self, sequence: SequenceState, finish: FinishReason | None, reason: str) -> None:
        """Record a request and its phases, as far as it came; `reason` is that of its error."""
        trace = sequence.request.trace
        if not is_sampled(trace):
            return
        now_s, arrived_s = self._clock(), sequence.arrived_s
        parent = self._tracing.record(
            "engine.request",
            trace,
            (arrived_s, now_s),
            ours(
                request_id=sequence.request_id,
                prompt_tokens=sequence.num_prompt_tokens,
                replayed_tokens=len(sequence.request.output_token_ids),
                output_tokens=sequence.num_output_tokens,
                finish_reason=finish.value if finish is not None else "error",
            ),
            error=reason,
        )
        admitted_s = now_s if sequence.queue_s is None else arrived_s + sequence.queue_s
        self._tracing.record("queue", parent, (arrived_s, admitted_s))
        if sequence.queue_s is None:
            return
        first_s = sequence.first_token_s or now_s
        self._tracing.record("prefill", parent, (admitted_s, first_s))
        if sequence.first_token_s is not None:
            self._tracing.record("decode", parent, (first_s, now_s))

    def begin_step(self, spans: Sequence[PlannedSpan]) -> Before | None:
        """Read the counters before a step that is to be recorded; None for one that is not."""
        now_s = self._clock()
        if now_s < self._next_step_s or not any(is_sampled(span.sequence.request.trace) for span in spans):
            return None
        self._next_step_s = now_s + STEP_INTERVAL_S
        traffic = self._traffic
        return Before(now_s, dict(traffic.reply_seconds), dict(traffic.rows_out))

    def end_step(self, before: Before, step: int, spans: Sequence[PlannedSpan]) -> None:
        """Record a step under the first traced request in it, linked with the others; before its stations are counted.

        Its stations are what the engine did since the step before it ended, also where several are in flight.
        """
        traces = [span.sequence.request.trace for span in spans if is_sampled(span.sequence.request.trace)]
        taken = zip(NAMES, self._stations.step_ns, strict=True)
        stations = {f"{name}_s": taken_ns / 1e9 for name, taken_ns in taken if taken_ns > 0}
        self._tracing.record(
            "engine.step",
            traces[0],
            (before.began_s, self._clock()),
            ours(step=step, sequences=len(spans), tokens=sum(span.num_tokens for span in spans), **stations),
            links=traces[1 : 1 + MAX_LINKS],
            events=[
                ("expert_host", ours(host=host, rows=rows, reply_s=self._reply_s(host, before)))
                for host, total in self._traffic.rows_out.items()
                if (rows := total - before.rows_out.get(host, 0))
            ],
        )

    def _reply_s(self, host: str, before: Before) -> float:
        return self._traffic.reply_seconds.get(host, 0.0) - before.reply_seconds.get(host, 0.0)
