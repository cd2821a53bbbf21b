"""Decides what one step computes: pure functions of sequence state that return a plan and change nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.sequence import SequenceState


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedSpan:
    """`num_tokens` pending tokens of one sequence, and the blocks it must get first."""

    sequence: SequenceState
    num_tokens: int
    num_new_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """One step: preempt, admit, then compute the spans in order."""

    spans: tuple[PlannedSpan, ...]
    preempted: tuple[SequenceState, ...]
    admitted: tuple[SequenceState, ...]


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold `num_tokens` positions."""
    return -(-num_tokens // block_size)


def plan_step(
    running: Sequence[SequenceState], waiting: Sequence[SequenceState], *, num_free: int, options: EngineOptions
) -> StepPlan:
    """Plan decodes first, then prefill chunks of running sequences, then admissions; all oldest first.

    A sequence gets blocks for all its known tokens when it is admitted, so only decoding can run out; then the
    youngest running sequence is preempted (vLLM's recompute policy). The oldest is preempted for no other, and any
    single sequence fits an empty cache, hence the oldest always advances. Both inputs are sorted by `order`.
    """
    kept, preempted, num_free = _grow_decodes(running, num_free, options.block_size)
    budget = _Budget(options.max_num_batched_tokens, options.max_logit_rows)
    decodes = [s for s in kept if s.num_pending == 1]
    prefills = [s for s in kept if s.num_pending > 1]
    spans = [span for s in (*decodes, *prefills) if (span := budget.spend(s, options.block_size))]
    admitted: list[SequenceState] = []
    # After a preemption nothing is admitted: it would take back the blocks that were just freed.
    for sequence in () if preempted else waiting:
        need = blocks_for(len(sequence.tokens), options.block_size)
        if need > num_free or len(kept) + len(admitted) >= options.max_num_seqs:
            break  # no overtaking: a long prompt at the head is not starved by short ones behind it
        span = budget.spend(sequence, options.block_size)
        if span is None:
            break
        num_free -= need
        admitted.append(sequence)
        spans.append(span)
    return StepPlan(spans=tuple(spans), preempted=tuple(preempted), admitted=tuple(admitted))


def _grow_decodes(
    running: Sequence[SequenceState], num_free: int, block_size: int
) -> tuple[list[SequenceState], list[SequenceState], int]:
    """Find room for one more token of every running sequence, preempting from the youngest end."""
    kept = list(running)
    preempted: list[SequenceState] = []
    needed = {s.request_id: _missing_blocks(s, block_size) for s in kept}
    while sum(needed[s.request_id] for s in kept) > num_free:
        victim = kept.pop()
        preempted.append(victim)
        num_free += len(victim.blocks)
    return kept, preempted, num_free - sum(needed[s.request_id] for s in kept)


def _missing_blocks(sequence: SequenceState, block_size: int) -> int:
    return max(0, blocks_for(len(sequence.tokens), block_size) - len(sequence.blocks))


class _Budget:
    """Tokens and logit rows left in this step."""

    def __init__(self, num_tokens: int, num_logit_rows: int) -> None:
        self.num_tokens = num_tokens
        self.num_logit_rows = num_logit_rows

    def spend(self, sequence: SequenceState, block_size: int) -> PlannedSpan | None:
        count = min(sequence.num_pending, self.num_tokens)
        if sequence.wants_prompt_logprobs:
            count = min(count, self.num_logit_rows)
            self.num_logit_rows -= count
        if count == 0:
            return None
        self.num_tokens -= count
        return PlannedSpan(sequence=sequence, num_tokens=count, num_new_blocks=_missing_blocks(sequence, block_size))
