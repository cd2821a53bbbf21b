"""Removes and reweights tokens before penalties: allowed and bad tokens, min_tokens, logit_bias."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_dist.engine.sequence import SequenceState


def needs_masks(sequence: SequenceState) -> bool:
    """Return whether this sequence's next token has any of these restrictions."""
    sampling = sequence.sampling
    return bool(
        sampling.allowed_token_ids is not None
        or sampling.bad_token_ids
        or sampling.logit_bias
        or sequence.num_output_tokens < sampling.min_tokens
    )


def apply_masks(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> None:
    """Change `logits_PV` in place; row i belongs to sequences[i]."""
    for row, sequence in enumerate(sequences):
        sampling, logits_V = sequence.sampling, logits_PV[row]
        if sampling.allowed_token_ids is not None:
            allowed = _index(sampling.allowed_token_ids, logits_V)
            kept = logits_V[allowed]
            logits_V.fill_(-math.inf)
            logits_V[allowed] = kept
        if sampling.bad_token_ids:
            logits_V[_index(sampling.bad_token_ids, logits_V)] = -math.inf
        if sequence.num_output_tokens < sampling.min_tokens and sequence.end_token_ids:
            logits_V[_index(sorted(sequence.end_token_ids), logits_V)] = -math.inf
        if sampling.logit_bias:
            bias = torch.tensor(tuple(sampling.logit_bias.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[_index(tuple(sampling.logit_bias), logits_V)] += bias


def _index(token_ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=like.device)
