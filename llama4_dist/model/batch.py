"""What one step computes: tokens of several sequences, packed, and where their keys and values live."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceSpan:
    """One sequence's part of a step: `num_tokens` new tokens after `num_cached` positions already in the cache.

    `blocks` are the sequence's cache blocks in order of position; they cover the new tokens too.
    """

    num_tokens: int
    num_cached: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """The tokens of all spans, one span after the other; `logit_rows` are the rows whose logits are wanted."""

    step: int
    token_ids_T: Tensor
    spans: tuple[SequenceSpan, ...]
    logit_rows: tuple[int, ...]
