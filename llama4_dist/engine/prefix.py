"""Names the contents of full KV blocks by a chain of hashes and finds how much of a text is there already; pure.

A block's key covers all tokens up to its end, what the numbers depend on (model, dtypes) and whose they are. Two
tenants never have a key in common, so neither can learn from timing what the other has asked. As in vLLM's automatic
prefix caching; the tenant stands for its `cache_salt` (RFC vllm-project/vllm#16016).
"""

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llama4_dist.engine.page_move import Pages
from llama4_dist.model.batch import PageRun
from llama4_dist.model.kv_layout import KVLayout

Key = tuple[int, bytes]  # group, chained hash of the block
KEY_BYTES = 16  # collisions among 2^40 blocks have odds of 2^-49


class PrefixChain:
    """The keys of one text's full blocks, made as far as they are asked for. The text may grow, never change."""

    def __init__(self, tokens: Sequence[int], *, root: bytes, block_size: int) -> None:
        self._tokens = tokens
        self._block_size = block_size
        self._keys = [hashlib.blake2b(root, digest_size=KEY_BYTES).digest()]

    def key(self, block: int) -> bytes:
        """Return the key of a block; all its tokens must be known."""
        while len(self._keys) <= block + 1:
            start = (len(self._keys) - 1) * self._block_size
            tokens = self._tokens[start : start + self._block_size]
            assert len(tokens) == self._block_size, f"block {block} is not full"
            packed = array("q", tokens).tobytes()
            self._keys.append(hashlib.blake2b(self._keys[-1] + packed, digest_size=KEY_BYTES).digest())
        return self._keys[block + 1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixHit:
    """The first `num_blocks` blocks of a text are in `pages`: all of them of full layers, of chunked ones the chunk."""

    num_blocks: int
    pages: Pages


NO_HIT = PrefixHit(num_blocks=0, pages=())


def find_prefix(
    chain: PrefixChain,
    num_tokens: int,
    *,
    layout: KVLayout,
    block_size: int,
    page_of: Callable[[Key], int | None],
) -> PrefixHit:
    """Return the longest start of a text whose next position finds all that it sees in cached pages.

    The last token is never part of it: its logits are wanted. Whole blocks are shared and nothing is ever written to
    them: a sequence computes the rest, the rest of a block too, into pages of its own.
    """
    found: list[dict[int, int]] = [{} for _ in layout.groups]  # block -> page
    best = streak = 0  # streak: blocks in a row, up to here, that all chunked groups have
    for block in range((num_tokens - 1) // block_size):
        key, streak = chain.key(block), streak + 1
        for number, group in enumerate(layout.groups):
            page = page_of((number, key))
            if page is not None:
                found[number][block] = page
            elif group.chunk_size is None:
                return _hit(best, found, layout, block_size)
            else:
                streak = 0
        end = (block + 1) * block_size
        if streak > block - _first_key(layout, end) // block_size:
            best = block + 1
    return _hit(best, found, layout, block_size)


def _first_key(layout: KVLayout, position: int) -> int:
    """Return the first key that chunked layers need at a position."""
    return 0 if layout.chunk_size is None else position // layout.chunk_size * layout.chunk_size


def _hit(num_blocks: int, found: Sequence[Mapping[int, int]], layout: KVLayout, block_size: int) -> PrefixHit:
    if not num_blocks:
        return NO_HIT
    end = num_blocks * block_size
    blocks = layout.blocks(num_cached=end, end=end, num_known=end, block_size=block_size)
    pages = (
        PageRun(first_block=wanted.start, ids=tuple(pages_of[block] for block in wanted))
        for wanted, pages_of in zip(blocks, found, strict=True)
    )
    return PrefixHit(num_blocks=num_blocks, pages=tuple(pages))
