"""Moving a sequence's pages gives back exactly those in front and takes exactly those behind."""

from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.engine.page_move import PageMove, num_covered, page_ids
from llama4_dist.model.batch import PageRun
from llama4_dist.model.kv_layout import KVGroup, KVLayout

FULL_AND_CHUNKED = KVLayout(
    groups=(
        KVGroup(layers=(0,), chunk_size=None),
        KVGroup(layers=(1,), chunk_size=12),
        KVGroup(layers=(2,), chunk_size=12),
    )
)


@given(st.lists(st.tuples(st.integers(1, 15), st.integers(0, 20)), max_size=12), st.sampled_from([1, 4, 5]))
def test_a_sequence_that_moves_on_holds_a_page_for_each_block_it_needs(
    parts: list[tuple[int, int]], block_size: int
) -> None:
    pages: tuple[PageRun, ...] = ()
    held: set[int] = set()
    num_cached = next_page = reached = 0
    for count, beyond in parts:
        end = num_cached + count
        reached = max(reached, end + beyond)
        blocks = FULL_AND_CHUNKED.blocks(num_cached=num_cached, end=end, num_known=reached, block_size=block_size)
        move = PageMove(pages=pages, blocks=blocks)
        taken = tuple(range(next_page, next_page := next_page + move.num_taken))
        held = held - set(move.dropped) | set(taken)
        before, pages = pages, move.apply(taken)
        assert sorted(page_ids(pages)) == sorted(held)
        for run, wanted in zip(pages, blocks, strict=True):
            assert run.first_block == wanted.start
            assert run.stop_block >= wanted.stop  # what was taken for a longer step stays
        for old, new in zip(before, pages, strict=False):
            kept = dict(zip(range(old.first_block, old.stop_block), old.ids, strict=True))
            now = dict(zip(range(new.first_block, new.stop_block), new.ids, strict=True))
            assert all(now[block] == page for block, page in kept.items() if block in now), (
                "a kept block changed its page"
            )
        assert num_covered(pages, block_size) >= end
        num_cached = end


def test_runs_that_do_not_move_stay_the_same_objects() -> None:
    pages = (PageRun(first_block=0, ids=(3, 1)), PageRun(first_block=0, ids=(2,)))
    moved = PageMove(pages=pages, blocks=(range(2), range(2))).apply((7,))
    assert moved[0] is pages[0]
    assert (moved[1].first_block, moved[1].ids) == (0, (2, 7))
