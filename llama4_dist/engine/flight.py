"""The steps under way, oldest first, and what becomes of one that failed. Ends no sequence; that is the engine's part.

A model that is whole has one; one of P stages has up to P, of different sequences, and computes them in their order.
"""

import logging
from collections import deque
from dataclasses import dataclass, field

from llama4_dist.engine.in_flight import NOTHING_IN_FLIGHT, InFlight
from llama4_dist.engine.plan import PlannedSpan, StepPlan
from llama4_dist.engine.request_traces import Before
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.engine.step import Result, StepRunner, Submitted
from llama4_dist.engine.step_times import StepTimes
from llama4_dist.errors import EngineError, Llama4Error, UnavailableError
from llama4_dist.stages.ports import is_lost

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """A step from its plan to its results; `beside` is what was in flight when it began."""

    spans: tuple[PlannedSpan, ...]
    num_decodes: int
    num_tokens: int
    beside: InFlight
    started_s: float
    before: Before | None  # of its trace
    num_sampling: int = 0  # counted where steps are in flight
    submitted: Submitted | None = None  # None: the model computes it when it is asked for its results
    error: Exception | None = None
    results: list[Result] = field(default_factory=list)
    ended: set[SequenceState] = field(default_factory=set)  # since it was planned

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens - self.num_decodes

    @property
    def live(self) -> tuple[PlannedSpan, ...]:
        """The spans of those that have not ended."""
        return tuple(span for span in self.spans if span.sequence not in self.ended) if self.ended else self.spans

    @property
    def number(self) -> int | None:
        """What the model calls it, where it was begun before it is finished."""
        return None if self.submitted is None else self.submitted.step_batch.batch.step

    def teach(self, times: StepTimes, *, now_s: float) -> None:
        """Say what it took: it waited at every stage for those before it, so it took that for their tokens too."""
        times.note(
            num_decodes=self.num_decodes + self.beside.num_decodes,
            num_prompt_tokens=self.num_prompt_tokens + self.beside.num_prompt_tokens,
            seconds=now_s - self.started_s,
        )


class Flight:
    """Submits steps and collects what came of them."""

    def __init__(self, runner: StepRunner) -> None:
        self.depth = runner.depth  # so many steps at most
        self.held: dict[SequenceState, UnavailableError] = {}  # what the last `collect` left as it was, and why
        self.lost: UnavailableError | None = None  # the last `collect` found that the keys of all sequences are gone
        self._runner = runner
        self._steps: deque[Step] = deque()
        self._step_of: dict[SequenceState, Step] = {}  # empty for a depth of 1: nothing happens between the two calls

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    def now(self) -> InFlight:
        """Return what the next plan must know."""
        if self.depth == 1:
            return NOTHING_IN_FLIGHT
        return InFlight(
            depth=self.depth,
            num_steps=len(self._steps),
            num_tokens=sum(step.num_tokens for step in self._steps),
            num_prompt_tokens=sum(step.num_prompt_tokens for step in self._steps),
            num_sampling=sum(step.num_sampling for step in self._steps),
            sequences=self._step_of.keys(),
        )

    def submit(self, plan: StepPlan, beside: InFlight, *, started_s: float, before: Before | None) -> None:
        """Begin a step; what goes wrong with it is told when it is collected."""
        step = Step(
            spans=plan.spans,
            num_decodes=sum(span.sequence.num_pending == 1 for span in plan.spans),
            num_tokens=sum(span.num_tokens for span in plan.spans),
            beside=beside,
            started_s=started_s,
            before=before,
        )
        self._steps.append(step)
        if self.depth == 1:
            return
        step.num_sampling = sum(span.num_tokens == span.sequence.num_pending for span in plan.spans)
        self._step_of |= dict.fromkeys((span.sequence for span in plan.spans), step)
        try:
            step.submitted = self._runner.submit(plan.spans, plan.num_parts)
        except Exception as error:  # noqa: BLE001 - handled where the step is collected
            step.error = error

    def forget(self, sequence: SequenceState) -> None:
        """Drop what the step that a sequence is in says of it: it has ended, and its pages may be another's."""
        step = self._step_of.pop(sequence, None)
        if step is not None:
            step.ended.add(sequence)

    def clear(self) -> None:
        """Forget all steps: the group that computed them is gone."""
        self._steps.clear()
        self._step_of.clear()

    def collect(self, *, everything: bool = False) -> list[Step]:
        """Wait for the oldest step and return it with its results: a token, or an error, for who has none pending.

        If it failed, or if `everything` is asked for, all steps are returned. Where an expert cannot be had just now,
        sequences are in `held`, and their spans can be computed again later. Where a member of the model's group is
        gone, `lost` says so, and nothing came of any step.
        """
        self.held.clear()
        self.lost = None
        steps = [self._land()]
        if everything or steps[0].error is not None:
            steps += [self._land() for _ in range(len(self._steps))]
        for step in steps:
            if step.error is not None:
                step.results = self._recover(step, step.error)
        return [] if self.lost is not None else steps

    def _land(self) -> Step:
        step = self._steps[0]  # in flight as long as it is waited for
        if step.error is None:
            try:
                step.results = self._runner.finish(step.spans, step.submitted)
            except Exception as error:  # noqa: BLE001 - `_recover` logs it
                step.error = error
        self._steps.popleft()
        if self.depth > 1:
            for span in step.spans:
                self._step_of.pop(span.sequence, None)
        if step.ended:
            step.results = [(sequence, result) for sequence, result in step.results if sequence not in step.ended]
        return step

    def _recover(self, step: Step, error: Exception) -> list[Result]:
        """Find out what a failed step can still give; by now nothing is under way."""
        if isinstance(error, UnavailableError):
            if is_lost(error):
                self.lost = self.lost or error
            else:
                self.held |= {span.sequence: error for span in step.live}
            return []
        if len(step.spans) == 1:
            return [_blamed(span, error) for span in step.live]
        # One sequence may be the cause. A step changes nothing before its end, so each is computed again, alone.
        log.warning("step_split sequences=%d cause=%s", len(step.spans), type(error).__name__)
        return [result for span in step.live for result in self._alone(span)]

    def _alone(self, span: PlannedSpan) -> list[Result]:
        try:
            return self._runner.run([span])
        except UnavailableError as error:
            if is_lost(error):
                self.lost = self.lost or error
            else:
                self.held[span.sequence] = error
            return []
        except Exception as error:  # noqa: BLE001 - logged, and told to who asked for it
            return [_blamed(span, error)]


def _blamed(span: PlannedSpan, error: Exception) -> Result:
    log.error("step_failed request_id=%s", span.sequence.request_id, exc_info=error)
    failure = f"the engine failed in a step: {type(error).__name__}"
    return span.sequence, error if isinstance(error, Llama4Error) else EngineError(failure)
