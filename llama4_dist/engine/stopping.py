"""Decides whether a sequence has ended; stop strings are the text layer's, not the engine's."""

from llama4_dist.engine.sequence import SequenceState
from llama4_dist.request import FinishReason


def finish_reason(sequence: SequenceState) -> FinishReason | None:
    """Return why the sequence ends with its last output token, or None if it goes on.

    An end token stops from `min_tokens` output tokens on (before, the sampler masks it); the token counts itself.
    """
    if sequence.num_output_tokens == 0:
        return None
    if sequence.tokens[-1] in sequence.end_token_ids and sequence.num_output_tokens > sequence.sampling.min_tokens:
        return FinishReason.STOP
    if sequence.num_output_tokens >= sequence.max_tokens:
        return FinishReason.LENGTH
    return None
