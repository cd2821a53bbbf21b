"""One engine, synchronous: takes requests, plans a step, computes it, says what came of it; knows no threads."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.engine.counters import Counters
from llama4_dist.engine.deadlines import too_late
from llama4_dist.engine.flight import Flight
from llama4_dist.engine.intake import check_fits, make_sequence
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.outputs import token_output
from llama4_dist.engine.page_allocator import PageAllocator
from llama4_dist.engine.plan import PlannedSpan
from llama4_dist.engine.request_traces import RequestTraces
from llama4_dist.engine.sampler import Sampled
from llama4_dist.engine.scheduler import Scheduler
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.engine.step import ForwardModel, StepRunner
from llama4_dist.engine.step_times import StepTimes
from llama4_dist.engine.stopping import finish_reason
from llama4_dist.errors import DeadlineExceededError, Llama4Error
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.request import EngineLimits, EngineRequest, FinishReason, TokenOutput
from llama4_dist.stages.ports import worker_lost
from llama4_dist.stations import SCHEDULE
from llama4_dist.telemetry.tracing import active

log = logging.getLogger(__name__)


class EngineCore:
    """Owns the sequences and the KV pages. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        model: ForwardModel,
        cache: KVCache,
        dispatcher: Dispatcher,
        *,
        limits: EngineLimits,
        options: EngineOptions,
        eos_token_ids: Sequence[int] = (),
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.options = options
        assert options.num_blocks is not None, "engine.build resolves num_blocks"
        allocator = PageAllocator(options.num_blocks)
        self.scheduler = Scheduler(allocator, cache.layout, options, fingerprint=cache.fingerprint)
        self.counters = Counters()
        self.runner = StepRunner(
            model, cache, dispatcher, counters=self.counters, device=device, num_microbatches=options.num_microbatches
        )
        self.flight = Flight(self.runner)
        self.clock = clock
        self.times = StepTimes(depth=self.flight.depth)
        self.held_since_s: float | None = None  # since when steps wait for what they cannot do without
        self.lost: Llama4Error | None = None  # why no step can be computed until `renew`
        self._eos_token_ids = frozenset(eos_token_ids)
        self._drained: list[TokenOutput] = []
        self._num_arrived = 0
        self._num_wrong_answers = 0
        self._traces: RequestTraces | None = None
        if (tracing := active()) is not None:
            self._traces = RequestTraces(
                tracing, stations=self.counters.stations, traffic=dispatcher.stats(), clock=clock
            )

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: sequences that live, or what came of those that did."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.flight.num_steps or self._drained)

    def add(self, request: EngineRequest, *, arrived_s: float | None = None) -> list[TokenOutput]:
        """Accept a request submitted at `arrived_s` (now, if left out); a replay that was complete ends at once."""
        check_fits(request, self.limits)
        sequence = make_sequence(
            request,
            limits=self.limits,
            eos_token_ids=self._eos_token_ids,
            arrival=self._num_arrived,
            now_s=self.clock() if arrived_s is None else arrived_s,
        )
        self._num_arrived += 1
        self.counters.admitted += 1
        self.scheduler.add(sequence)
        reason = finish_reason(sequence)
        if reason is not None:
            return [self._end(sequence, finish=reason)]
        late = too_late(sequence, self.scheduler, self.times, now_s=self.clock())
        return [] if late is None else [self._end(sequence, error=late)]

    def abort(self, request_id: str) -> list[TokenOutput]:
        """Cancel a request, if it is live; its blocks are free on return."""
        sequence = self.scheduler.get(request_id)
        return [] if sequence is None else [self._end(sequence, finish=FinishReason.CANCELLED)]

    def fail_all(self, error: Llama4Error) -> list[TokenOutput]:
        """End every live request with this error."""
        return [self._end(sequence, error=error) for sequence in self.scheduler.live()]

    def lose(self, error: Llama4Error) -> list[TokenOutput]:
        """End all that has keys in the cache, which is void: a member of the model's group is gone.

        Requests that have none wait for `renew`, `expert_timeout_s` at most.
        """
        self.lost = error
        self.flight.clear()
        self.scheduler.forget_prefixes()
        if self._traces is not None:
            self._traces.lose_steps(error.reason)
        return [self._end(sequence, error=error) for sequence in tuple(self.scheduler.running)]

    def renew(self) -> list[TokenOutput]:
        """Compute steps again: the model's group was formed anew, with an empty cache. What still runs ends."""
        outputs = self.lose(worker_lost("the model's group was formed anew")) if self.lost is None else []
        self.lost = None
        return outputs

    def step(self) -> list[TokenOutput]:
        """Begin steps while the model takes more, wait for the oldest, and return what came of it.

        Ends and errors are included, and what `drain` found before.
        """
        started_s = self.clock()
        outputs, self._drained = self._drained, []
        outputs += self._expire(started_s)
        if self.lost is not None:
            return outputs + self._hold(dict.fromkeys(self.scheduler.waiting, self.lost))
        self._begin_steps(started_s)
        if self.flight.num_steps:
            outputs += self._end_steps()
        if self.options.debug_invariants:
            self.scheduler.check()
        return outputs

    def drain(self) -> None:
        """Wait for all that is in flight; the next `step` returns what came of it."""
        while self.flight.num_steps:
            self._drained += self._end_steps()

    def _begin_steps(self, now_s: float) -> None:
        """Plan and submit until the model has all the steps that it takes, or nothing is left to plan."""
        stations = self.counters.stations
        stations.begin()
        while self.flight.num_steps < self.flight.depth:
            beside = self.flight.now()
            most = self.times.prompt_tokens_beside_decodes(
                self.options.max_decode_slowdown, at_least=self.options.block_size
            )
            plan = self.scheduler.schedule(max_prompt_tokens=most, flight=beside)
            for sequence in plan.admitted:
                if sequence.queue_s is None:
                    sequence.queue_s = now_s - sequence.arrived_s
                    self.counters.prompt_tokens += sequence.num_prompt_tokens
            stations.mark(SCHEDULE)
            if not plan.spans:
                return
            before = None if self._traces is None else self._traces.begin_step(plan.spans)
            self.runner.trace = "" if before is None else before.span.traceparent
            self.flight.submit(plan, beside, started_s=now_s, before=before)

    def _end_steps(self) -> list[TokenOutput]:
        """Wait for the oldest step and commit it; for all of them where something is not as usual.

        So what is held is held with nothing under way, and is over only when all sequences have a step that is not.
        """
        steps = self.flight.collect(everything=self.held_since_s is not None)
        if self.flight.lost is not None:
            return self.lose(self.flight.lost)
        outputs: list[TokenOutput] = []
        for step in steps:
            if not self.flight.held:
                step.teach(self.times, now_s=self.clock())
            self._keep_prefixes(step.live)  # before a sequence ends and gives its pages back
            outputs += [self._commit(sequence, result) for sequence, result in step.results]
        outputs += self._hold(self.flight.held)
        for step in steps:
            if step.before is not None and self._traces is not None:
                self._traces.end_step(step.before, step.number or self.counters.steps)
            self.counters.stations.end_step()
        return outputs

    def _keep_prefixes(self, spans: Sequence[PlannedSpan]) -> None:
        """Let what was computed be found, unless a host has been proved a liar: nobody knows since when it lied."""
        num_wrong_answers = self.runner.dispatcher.stats().wrong_answers.total()
        if num_wrong_answers > self._num_wrong_answers:
            self._num_wrong_answers = num_wrong_answers
            self.scheduler.forget_prefixes()
        else:
            self.scheduler.keep_prefixes(spans)

    def _commit(self, sequence: SequenceState, result: Sampled | Llama4Error) -> TokenOutput:
        """Append a sampled token and say so; tokens leave the engine only here, after the whole step."""
        if isinstance(result, Llama4Error):
            return self._end(sequence, error=result)
        sequence.append(result.token_id)
        self.counters.generated_tokens += 1
        if sequence.first_output and self._traces is not None:
            self._traces.note_first_token(sequence)
        reason = finish_reason(sequence)
        if reason is not None:
            self._forget(sequence, finish=reason)
        output = token_output(sequence, result, reason)
        sequence.first_output = False
        return output

    def _hold(self, held: Mapping[SequenceState, Llama4Error]) -> list[TokenOutput]:
        """Leave sequences as they are while something cannot be had; after the bound fail them as retriable.

        A step changes nothing before its end, so the next one computes the same rows again.
        """
        now_s = self.clock()
        if not held:
            if self.held_since_s is not None:
                self.counters.held_s += now_s - self.held_since_s
                log.warning("step_resumed after_s=%.3f", now_s - self.held_since_s)
            self.held_since_s = None
            return []
        if self.held_since_s is None:
            log.warning("step_held sequences=%d cause=%s", len(held), next(iter(held.values())))
            self.held_since_s = now_s
            self.counters.holds += 1
        if now_s - self.held_since_s < self.options.expert_timeout_s:
            return []
        log.error("step_unavailable sequences=%d", len(held))
        return [self._end(sequence, error=error) for sequence, error in held.items()]

    def _expire(self, now_s: float) -> list[TokenOutput]:
        late = [s for s in self.scheduler.live() if s.deadline_s is not None and now_s >= s.deadline_s]
        return [
            self._end(s, error=DeadlineExceededError(f"the deadline of {s.request.timeout_s} s passed; raise timeout"))
            for s in late
        ]

    def _end(
        self, sequence: SequenceState, *, finish: FinishReason | None = None, error: Llama4Error | None = None
    ) -> TokenOutput:
        self._forget(sequence, finish=finish, reason="" if error is None else error.reason)
        return TokenOutput(request_id=sequence.request_id, finish_reason=finish, error=error)

    def _forget(self, sequence: SequenceState, *, finish: FinishReason | None, reason: str = "") -> None:
        self.scheduler.remove(sequence)
        self.flight.forget(sequence)
        if self._traces is not None:
            self._traces.end(sequence, finish, reason)
        self.counters.count_end(finish)
        if self.held_since_s is not None and not self.scheduler.live():
            self.counters.held_s += self.clock() - self.held_since_s
            self.held_since_s = None  # nobody waits any more; whoever comes next waits from then on
