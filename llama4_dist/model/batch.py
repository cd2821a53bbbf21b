"""What one step computes: tokens of several sequences, packed, and where their keys and values live."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PageRun:
    """The pages of one sequence in one group of layers: `ids[i]` holds block `first_block + i` of its positions.

    A run is replaced when pages come or go and kept while they stay, so what is derived from it is derived once.
    """

    first_block: int
    ids: tuple[int, ...]

    @property
    def stop_block(self) -> int:
        return self.first_block + len(self.ids)

    @cached_property
    def ids_N(self) -> NDArray[np.int64]:
        """The ids as an array."""
        return np.array(self.ids, dtype=np.int64)

    @cached_property
    def address(self) -> int:
        """Where the id of block 0 would stand if the run held it; valid as long as the run lives."""
        ids_N = self.ids_N
        first: int = ids_N.__array_interface__["data"][0]  # `ndarray.ctypes` takes longer
        return first - self.first_block * ids_N.itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceSpan:
    """One sequence's part of a step: `num_tokens` new tokens after `num_cached` positions already in the cache.

    `pages` has a run for each group of the cache's layout. It covers the new tokens and all that they see.
    """

    num_tokens: int
    num_cached: int
    pages: tuple[PageRun, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """The tokens of all spans, one span after the other; `logit_rows` are the rows whose logits are wanted.

    A model whose experts are elsewhere takes the tokens through its layers in `num_microbatches` parts, numbered from
    `first_microbatch` on: a step that goes through stages is itself one of several parts. `trace` is the `traceparent`
    of the step's span, "" where it has none.
    """

    step: int
    token_ids_T: Tensor
    spans: tuple[SequenceSpan, ...]
    logit_rows: tuple[int, ...]
    num_microbatches: int = 1
    first_microbatch: int = 0
    trace: str = ""
