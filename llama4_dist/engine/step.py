"""Computes one planned step: batch, forward pass, sampling. Turns every failure into errors of those it concerns."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter_ns
from typing import Protocol

from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.microbatches import LayerTimes, MicrobatchChoice
from llama4_dist.engine import prompt_logprobs
from llama4_dist.engine.batch_builder import build_batch
from llama4_dist.engine.counters import Counters
from llama4_dist.engine.plan import PlannedSpan
from llama4_dist.engine.sampler import Sampled, sample
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.errors import EngineError, Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.stages.ports import is_lost
from llama4_dist.stations import ATTENTION, COMBINE, DISPATCH_WAIT, EXPERT, MODEL, OTHER, ROUTE, SAMPLE

log = logging.getLogger(__name__)

Result = tuple[SequenceState, Sampled | Llama4Error]


class ForwardModel(Protocol):
    """What the engine asks of a model; `Llama4` is one."""

    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor: ...


class StepRunner:
    """The model with its cache and its experts. It ends no sequence; that is the engine's part."""

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
        self._cache = cache
        self.held: dict[SequenceState, UnavailableError] = {}  # what the last `run` left as it was, and why
        self.lost: UnavailableError | None = None  # the last `run` found that the keys of all sequences are gone
        self._counters = counters
        self._num_microbatches = num_microbatches
        self._microbatches = MicrobatchChoice()
        self.trace = ""  # the `traceparent` of the step to be run, where that has a span
        self.local_hosts: Sequence[ExpertServer] = ()  # whose experts are computed on this thread

    def run(self, spans: Sequence[PlannedSpan]) -> list[Result]:
        """Compute the spans; return a token for each sequence that has none pending, or its error.

        Where an expert cannot be had just now, sequences are in `held` and their spans can be computed again later.
        Where a member of the model's group is gone, `lost` says so, and nothing came of the step.
        """
        self.held.clear()
        self.lost = None
        return self._run(spans)

    def _run(self, spans: Sequence[PlannedSpan]) -> list[Result]:
        try:
            return self._compute(spans)
        except UnavailableError as error:
            if is_lost(error):
                self.lost = error
                return []
            self.held |= {span.sequence: error for span in spans}
            return []
        except Exception as error:
            if len(spans) == 1:
                log.error("step_failed request_id=%s", spans[0].sequence.request_id, exc_info=error)
                failure = f"the engine failed in a step: {type(error).__name__}"
                return [(spans[0].sequence, error if isinstance(error, Llama4Error) else EngineError(failure))]
            # One sequence may be the cause. A step changes nothing before its end, so each is computed again, alone.
            log.warning("step_split sequences=%d cause=%s", len(spans), type(error).__name__)
            return [result for span in spans for result in self._run([span])]

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

    def _forward(self, batch: Batch) -> Tensor:
        stations, traffic = self._counters.stations, self.dispatcher.stats()
        waited_s, computed_s = traffic.wait_seconds, self._compute_seconds()
        started_ns = perf_counter_ns()
        stations.begin()
        try:
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

    def _compute(self, spans: Sequence[PlannedSpan]) -> list[Result]:
        step_batch = build_batch(spans, step=self._counters.next_step(), device=self.device, trace=self.trace)
        logits_PV = self.forward(step_batch.batch)
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


def _layer_times(taken_s: Sequence[float]) -> LayerTimes:
    """Return what all layers of a step took, by its stations; a reply is there when nobody waits for it any more."""
    shared_s = max(0.0, taken_s[EXPERT])
    reply_s = shared_s + taken_s[DISPATCH_WAIT]
    return LayerTimes(
        attention_s=taken_s[ATTENTION] + taken_s[ROUTE], shared_s=shared_s, reply_s=reply_s, expert_s=reply_s
    )
