"""Hands out KV blocks and takes them back; knows block numbers and owners, not tensors."""

from collections.abc import Iterable, Mapping, Sequence


class BlockAllocator:
    """A free list with an owner per block. `take` and `release` are O(blocks moved) and deterministic."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"{num_blocks=} must be at least 1")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm in cache
        self._owner: dict[int, str] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, owner: str, count: int) -> tuple[int, ...]:
        """Give `count` blocks to `owner`; the caller has checked `num_free`."""
        assert count <= len(self._free), f"{owner} wants {count} blocks, {len(self._free)} are free"
        blocks = tuple(self._free.pop() for _ in range(count))
        self._owner.update(dict.fromkeys(blocks, owner))
        return blocks

    def release(self, owner: str, blocks: Iterable[int]) -> None:
        """Take blocks back from `owner`."""
        for block in blocks:
            held_by = self._owner.pop(block, None)
            assert held_by == owner, f"block {block} belongs to {held_by}, not to {owner}"
            self._free.append(block)

    def check(self, held: Mapping[str, Sequence[int]]) -> None:
        """Assert conservation against what the sequences say they hold: free + held = total, one owner each."""
        claimed = {block: owner for owner, blocks in held.items() for block in blocks}
        assert len(claimed) == sum(map(len, held.values())), "a block has two owners"
        assert claimed == self._owner, "sequences and allocator disagree on who owns which block"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not claimed.keys() & set(self._free), "a block is free and held"
        assert len(self._free) + len(claimed) == self.num_blocks, "blocks were lost"
