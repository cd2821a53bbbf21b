"""Finds pages for the next positions of all that run, and says who must give theirs back for that; pure."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from llama4_dist.engine.page_move import PageMove, Pages, page_ids
from llama4_dist.engine.prefix import Key
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.model.kv_layout import KVLayout


class PagePool(Protocol):
    """What a plan reads of the pages; `PageAllocator` is one."""

    @property
    def num_free(self) -> int: ...
    def num_holders(self, page: int) -> int: ...
    def page_of(self, key: Key) -> int | None: ...


class Room(NamedTuple):
    """Who stays and who is preempted, how the pages of those that stay move, and what is free after that."""

    kept: list[SequenceState]
    preempted: list[SequenceState]
    moves: dict[str, PageMove]
    num_free: int
    freed: set[int]  # pages that the moves leave to nobody


def find_room(
    running: Sequence[SequenceState],
    in_flight: Collection[SequenceState],
    *,
    pool: PagePool,
    layout: KVLayout,
    block_size: int,
) -> Room | None:
    """Find room for the next tokens of those that are not in flight, preempting from the youngest end.

    None where the youngest is in flight: it keeps its pages until its step is over, and no older one gives way to it.
    """
    kept = list(running)
    preempted: list[SequenceState] = []
    idle = [s for s in kept if s not in in_flight] if in_flight else kept
    moves = {s.request_id: move for s in idle if (move := _next_move(s, layout, block_size))}
    while True:
        freed, num_taken = _exchanged(kept, preempted, moves, pool)
        if (num_free := pool.num_free + len(freed) - num_taken) >= 0:
            return Room(kept=kept, preempted=preempted, moves=moves, num_free=num_free, freed=freed)
        if kept[-1] in in_flight:
            return None
        preempted.append(kept.pop())


def move_to(
    pages: Pages, num_cached: int, num_known: int, layout: KVLayout, block_size: int, *, end: int | None = None
) -> PageMove:
    """Return how pages must move before positions up to `end` (default: the next one) are computed."""
    blocks = layout.blocks(num_cached=num_cached, end=end or num_cached + 1, num_known=num_known, block_size=block_size)
    return PageMove(pages=pages, blocks=blocks)


def _next_move(sequence: SequenceState, layout: KVLayout, block_size: int) -> PageMove | None:
    """Return how the pages of a running sequence must move before its next position; None if they stay."""
    first, num_known = sequence.num_cached, len(sequence.tokens)
    if num_known - first == 1 and num_known <= sequence.num_covered:
        return None
    return move_to(sequence.pages, first, num_known, layout, block_size)


def _exchanged(
    kept: Iterable[SequenceState],
    preempted: Iterable[SequenceState],
    moves: dict[str, PageMove],
    pool: PagePool,
) -> tuple[set[int], int]:
    """Return which pages get free when preempted sequences give theirs back and kept ones move, and the number taken.

    A page is free when all its holders have let go.
    """
    given_back: Counter[int] = Counter()
    num_taken = 0
    for sequence in preempted:
        given_back.update(page_ids(sequence.pages))
    for sequence in kept:
        if move := moves.get(sequence.request_id):
            given_back.update(move.dropped)
            num_taken += move.num_taken
    return {page for page, count in given_back.items() if count == pool.num_holders(page)}, num_taken
