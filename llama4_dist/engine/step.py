"""Computes one planned step: batch, forward pass, sampling; whatever fails is raised, and nothing has changed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Protocol, runtime_checkable

from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.microbatches import LayerTimes, MicrobatchChoice
from llama4_dist.engine import prompt_logprobs
from llama4_dist.engine.batch_builder import StepBatch, build_batch
from llama4_dist.engine.counters import Counters
from llama4_dist.engine.plan import PlannedSpan
from llama4_dist.engine.sampler import Sampled, sample
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.errors import Llama4Error
from llama4_dist.model.batch import Batch
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.stations import ATTENTION, COMBINE, DISPATCH_WAIT, EXPERT, MODEL, OTHER, ROUTE, SAMPLE

Result = tuple[SequenceState, Sampled | Llama4Error]
Parts = tuple[Batch, ...]


class ForwardModel(Protocol):
    """What the engine asks of a model; `Llama4` is one."""

    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor: ...


@runtime_checkable
class SteadyModel(ForwardModel, Protocol):
    """A model that has up to `depth` steps in flight; `PipelinedModel` is one.

    They are computed in the order they were submitted in, and must be collected in it.
    """

    depth: int

    def submit(self, batch: Batch, num_parts: int) -> Parts:
        """Begin a step and return at once what `collect` asks for."""

    def collect(self, parts: Parts, dispatcher: Dispatcher) -> Tensor:
        """Wait for a step that was begun; return what `forward` returns, and raise what it raises."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Submitted:
    """A step that the model has begun."""

    step_batch: StepBatch
    parts: Parts


class StepRunner:
    """The model with its cache and its experts. It holds no step between two calls."""

    def __init__(
        self,
        model: ForwardModel,
        cache: KVCache,
        dispatcher: Dispatcher,
        *,
        counters: Counters,
        device: str,
        num_microbatches: int | None = None,
    ) -> None:
        self.model = model
        self.dispatcher = dispatcher
        self.device = device
        self._steady = model if isinstance(model, SteadyModel) else None
        self._cache = cache
        self._counters = counters
        self._num_microbatches = num_microbatches
        self._microbatches = MicrobatchChoice()
        self.trace = ""  # the `traceparent` of the step to be run, where that has a span
        self.local_hosts: Sequence[ExpertServer] = ()  # whose experts are computed on this thread

    @property
    def depth(self) -> int:
        """How many steps can be in flight."""
        return 1 if self._steady is None else self._steady.depth

    def run(self, spans: Sequence[PlannedSpan]) -> list[Result]:
        """Compute the spans; return a token for each sequence that has none pending. Nothing else may be in flight."""
        return self.finish(spans, self.submit(spans, self.depth))

    def submit(self, spans: Sequence[PlannedSpan], num_parts: int) -> Submitted | None:
        """Begin a step in so many parts; None where the model computes one when it is finished."""
        if self._steady is None:
            return None
        stations, started_ns = self._counters.stations, perf_counter_ns()
        stations.begin()
        step_batch = self._build(spans)
        parts = self._steady.submit(step_batch.batch, num_parts)
        stations.mark(OTHER)
        stations.add(MODEL, perf_counter_ns() - started_ns)
        return Submitted(step_batch=step_batch, parts=parts)

    def finish(self, spans: Sequence[PlannedSpan], submitted: Submitted | None) -> list[Result]:
        """Wait for a step that was submitted, or compute it now; sample from its logits."""
        step_batch = self._build(spans) if submitted is None else submitted.step_batch
        if submitted is None:
            logits_PV = self.forward(step_batch.batch)
        else:
            logits_PV = self._forward(step_batch.batch, submitted.parts)
        self._counters.stations.begin()
        for rows in step_batch.prompt_rows:
            prompt_logprobs.collect(rows, logits_PV)
        if len(step_batch.sampled_rows) < len(logits_PV):  # a copy of all rows of a large vocabulary takes milliseconds
            logits_PV = logits_PV[list(step_batch.sampled_rows)]
        results = sample(logits_PV, step_batch.sampled)
        for span in spans:
            span.sequence.num_cached += span.num_tokens
        self._counters.stations.mark(SAMPLE)
        return list(zip(step_batch.sampled, results, strict=True))

    def forward(self, batch: Batch) -> Tensor:
        """Run the model on a batch, timed, in as many parts as pay; return logits_PV."""
        if not self.dispatcher.overlaps:
            return self._forward(batch)
        num_parts = self._num_microbatches or self._microbatches.choose(len(batch.token_ids_T))
        before_ns = self._counters.stations.step_ns.copy()
        logits_PV = self._forward(replace(batch, num_microbatches=num_parts))
        if self._num_microbatches is None:
            taken_ns = zip(self._counters.stations.step_ns, before_ns, strict=True)
            taken_s = [(now_ns - then_ns) / 1e9 for now_ns, then_ns in taken_ns]
            self._microbatches.observe(len(batch.token_ids_T), num_parts, taken_s[MODEL], _layer_times(taken_s))
        return logits_PV

    def _forward(self, batch: Batch, begun: Parts | None = None) -> Tensor:
        stations, traffic = self._counters.stations, self.dispatcher.stats()
        waited_s, computed_s = traffic.wait_seconds, self._compute_seconds()
        started_ns = perf_counter_ns()
        stations.begin()
        try:
            if begun is not None and self._steady is not None:
                return self._steady.collect(begun, self.dispatcher)
            return self.model.forward(batch, self._cache, self.dispatcher)
        except BaseException:
            self.dispatcher.begin_step(batch.step)  # forgets the rows that a broken pass left in flight
            raise
        finally:
            stations.mark(OTHER)
            stations.add(MODEL, perf_counter_ns() - started_ns)
            waited_ns = round(1e9 * (traffic.wait_seconds - waited_s))
            computed_ns = round(1e9 * (self._compute_seconds() - computed_s))
            stations.add(DISPATCH_WAIT, waited_ns)
            stations.add(EXPERT, computed_ns)
            # Both happened within what the model marked as combine; in one that marks nothing, as other.
            inside_ns = waited_ns + computed_ns
            stations.add(COMBINE if stations.step_ns[COMBINE] >= inside_ns else OTHER, -inside_ns)

    def _compute_seconds(self) -> float:
        return sum(host.stats().compute_seconds for host in self.local_hosts)

    def _build(self, spans: Sequence[PlannedSpan]) -> StepBatch:
        return build_batch(spans, step=self._counters.next_step(), device=self.device, trace=self.trace)


def _layer_times(taken_s: Sequence[float]) -> LayerTimes:
    """Return what all layers of a step took, by its stations; a reply is there when nobody waits for it any more."""
    shared_s = max(0.0, taken_s[EXPERT])
    reply_s = shared_s + taken_s[DISPATCH_WAIT]
    return LayerTimes(
        attention_s=taken_s[ATTENTION] + taken_s[ROUTE], shared_s=shared_s, reply_s=reply_s, expert_s=reply_s
    )
