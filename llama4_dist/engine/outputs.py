"""Says what a sampled token means to who asked for it; knows no scheduler and no pages."""

from llama4_dist.engine.sampler import Sampled
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.request import FinishReason, TokenOutput


def token_output(sequence: SequenceState, sampled: Sampled, reason: FinishReason | None) -> TokenOutput:
    """Return the output for the newest token; what comes with the first one comes while `first_output` is set."""
    first = sequence.first_output
    return TokenOutput(
        request_id=sequence.request_id,
        token_ids=(sampled.token_id,),
        logprobs=None if sampled.logprobs is None else (sampled.logprobs,),
        prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
        finish_reason=reason,
        stop_token_id=sampled.token_id if reason is FinishReason.STOP else None,
        queue_s=sequence.queue_s if first else None,
    )
