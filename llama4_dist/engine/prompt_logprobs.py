"""Gathers the log-probabilities of a prompt over the steps that compute it."""

from torch import Tensor

from llama4_dist.engine.batch_builder import PromptRows
from llama4_dist.engine.logprobs import position_logprobs


def collect(rows: PromptRows, logits_PV: Tensor) -> None:
    """Append what these rows add to the sequence's prompt log-probabilities; the first position has none."""
    sequence = rows.sequence
    found = sequence.prompt_logprobs or [None]
    # After a preemption, or when a step is run again, the first positions come again; they are known.
    first = rows.start + max(0, len(found) - 1 - rows.first_position)
    targets = sequence.tokens[len(found) : len(found) + rows.stop - first]
    num_top = [sequence.sampling.prompt_logprobs or 0] * len(targets)
    sequence.prompt_logprobs = [*found, *position_logprobs(logits_PV[first : rows.stop], targets, num_top)]
