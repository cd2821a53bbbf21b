"""Spans of an engine's requests, and now and then of a step that served one.

Those of requests are made when they are over, and only for requests whose caller traces is anything made at all. A
step's span says how long each station and each expert host took: at most one a second, since all steps of a moment are
alike. It is begun with the step, because members of an attention group make spans under it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.dispatch.traffic_mark import TrafficMark
from llama4_dist.engine.plan import PlannedSpan
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.request import FinishReason
from llama4_dist.stations import NAMES, Stations
from llama4_dist.telemetry.tracing import OpenSpan, Tracing, is_sampled, ours

STEP_INTERVAL_S = 1.0
MAX_LINKS = 32


class Before(NamedTuple):
    """The span of a step that runs, and what the dispatcher's counters said when it began."""

    span: OpenSpan
    traffic: TrafficMark


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
        self._running: list[Before] = []

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
        """Begin the span of a step under the first traced request in it, linked with the others; None for most steps.

        `end_step` ends it, or `lose_steps`.
        """
        now_s = self._clock()
        if now_s < self._next_step_s:
            return None
        traces = [span.sequence.request.trace for span in spans if is_sampled(span.sequence.request.trace)]
        if not traces:
            return None
        self._next_step_s = now_s + STEP_INTERVAL_S
        said = ours(sequences=len(spans), tokens=sum(span.num_tokens for span in spans))
        span = self._tracing.begin("engine.step", traces[0], said, links=traces[1 : 1 + MAX_LINKS])
        before = Before(span, TrafficMark(self._traffic))
        self._running.append(before)
        return before

    def end_step(self, before: Before, step: int) -> None:
        """End a step's span, before its stations are counted.

        They are what the engine did since the step before it ended, also where several are in flight.
        """
        self._running.remove(before)
        taken = zip(NAMES, self._stations.step_ns, strict=True)
        stations = {f"{name}_s": taken_ns / 1e9 for name, taken_ns in taken if taken_ns > 0}
        before.span.say(ours(step=step, **stations))
        for name, said in before.traffic.events():
            before.span.event(name, said)
        before.span.end()

    def lose_steps(self, reason: str) -> None:
        """End the spans of steps that nothing comes of: members have made spans under them."""
        running, self._running = self._running, []
        for before in running:
            before.span.end(reason)
