"""Refuses a request at once whose deadline can surely not be met, so that it takes no memory from those who can."""

from llama4_dist.engine.prefix import find_prefix
from llama4_dist.engine.scheduler import Scheduler
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.engine.step_times import StepTimes
from llama4_dist.errors import OverloadedError

# A request is refused only if it needs this many times the time it has: measured times vary, and others may end early.
CERTAINTY = 2.0


def too_late(
    sequence: SequenceState, scheduler: Scheduler, times: StepTimes, *, now_s: float
) -> OverloadedError | None:
    """Return the refusal of a sequence just added if it cannot be done in time; None if it may.

    Counted is what must come before its end: prompt tokens of its own tenant that are ahead of it, its own that are not
    cached, and a step for each token it must generate.
    """
    if sequence.deadline_s is None or sequence.request.output_token_ids:  # what another engine began is not refused
        return None
    ahead = [other for other in scheduler.live() if other is not sequence and _is_ahead(other, sequence)]
    num_own = len(sequence.tokens) - _num_found(sequence, scheduler)
    num_tokens = num_own + sum(other.num_pending for other in ahead)
    num_output = sequence.max_tokens if sequence.sampling.ignore_eos else sequence.sampling.min_tokens
    num_steps = max(0, num_output - sequence.num_output_tokens - 1)  # the first token comes with the prompt
    needed_s = times.seconds_for(num_prompt_tokens=num_tokens, num_decodes=num_steps)
    left_s = max(0.0, sequence.deadline_s - now_s)
    if needed_s <= CERTAINTY * left_s:
        return None
    waited_s = needed_s - times.seconds_for(num_prompt_tokens=num_own, num_decodes=num_steps)
    return OverloadedError(
        f"{num_tokens} prompt tokens and {num_steps} more steps take about {needed_s:.3g} s, the deadline is in "
        f"{left_s:.3g} s: raise timeout, shorten the request, or come back later",
        reason="DEADLINE_UNREACHABLE",
        retry_after_s=min(60.0, max(0.1, waited_s)),
    )


def _is_ahead(other: SequenceState, sequence: SequenceState) -> bool:
    """Tell whether all of another's prompt is computed first: only within a tenant is that sure."""
    return other.request.tenant == sequence.request.tenant and other.order < sequence.order and other.num_pending > 1


def _num_found(sequence: SequenceState, scheduler: Scheduler) -> int:
    if sequence.chain is None or sequence.wants_prompt_logprobs:
        return 0
    block_size = scheduler.options.block_size
    hit = find_prefix(
        sequence.chain,
        len(sequence.tokens),
        layout=scheduler.layout,
        block_size=block_size,
        page_of=scheduler.allocator.page_of,
    )
    return hit.num_blocks * block_size
