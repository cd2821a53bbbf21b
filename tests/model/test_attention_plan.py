"""The plan lets every query see its own sequence's right keys and nothing else, found here by walking one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_dist.model.attention_plan import LayerPlan
from llama4_dist.model.batch import PageRun, SequenceSpan
from llama4_dist.model.key_axes import KeyAxes
from llama4_dist.model.query_runs import MAX_GATHERED_KEYS, QueryRun, decode_groups, padded_keys, query_runs

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def spans_of(parts: list[tuple[int, int]], chunk_size: int | None = None) -> list[SequenceSpan]:
    """Spans of (tokens, cached) with pages handed out backwards, so that no slot is where its position is.

    A run begins with the chunk of its first new position: that is all a sequence still holds then.
    """
    spans, next_block = [], 1000
    for num_tokens, num_cached in parts:
        num_blocks = -(-(num_tokens + num_cached) // BLOCK_SIZE)
        first_block = 0 if chunk_size is None else num_cached // chunk_size * chunk_size // BLOCK_SIZE
        ids = tuple(range(next_block - 1, next_block - 1 - num_blocks + first_block, -1))
        next_block -= num_blocks
        pages = (PageRun(first_block=first_block, ids=ids),)
        spans.append(SequenceSpan(num_tokens=num_tokens, num_cached=num_cached, pages=pages))
    return spans


def plan_of(spans: list[SequenceSpan], chunk_size: int | None) -> LayerPlan:
    return LayerPlan(0, spans, KeyAxes(spans, chunk_size, torch.float32, CPU), BLOCK_SIZE)


def seen_slots(plan: LayerPlan) -> dict[int, list[int]]:
    """For each row, the slots of the keys it sees, in order."""
    seen = {}
    for part in plan.prefill:
        for row in range(part.start, part.stop):
            seen[row] = part.slots_1S[0][part.mask_QS[row - part.start] == 0].tolist()
    for group in plan.decode:
        for index, row in enumerate(group.rows_B.tolist()):
            assert row not in seen
            seen[row] = group.slots_BS[index][group.mask_B11S[index, 0, 0] == 0].tolist()
    return seen


def slot(span: SequenceSpan, position: int) -> int:
    return span.pages[0].ids[position // BLOCK_SIZE - span.pages[0].first_block] * BLOCK_SIZE + position % BLOCK_SIZE


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 70)), min_size=1, max_size=5),
    st.sampled_from([None, 1, 3, 16, 33]),
)
def test_a_query_sees_the_keys_of_its_chunk_up_to_itself(parts: list[tuple[int, int]], chunk_size: int | None) -> None:
    spans = spans_of(parts, chunk_size)
    plan = plan_of(spans, chunk_size)
    seen, row, written = seen_slots(plan), 0, []
    for span in spans:
        for position in range(span.num_cached, span.num_cached + span.num_tokens):
            first = 0 if chunk_size is None else position // chunk_size * chunk_size
            assert seen[row] == [slot(span, key) for key in range(first, position + 1)]
            written.append(slot(span, position))
            row += 1
    assert len(seen) == row
    assert plan.slots_T.tolist() == written


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 70)), min_size=2, max_size=5))
def test_padding_keys_belong_to_the_same_sequence(parts: list[tuple[int, int]]) -> None:
    spans = spans_of(parts, 16)
    plan = plan_of(spans, 16)
    owner = {block: index for index, span in enumerate(spans) for block in span.pages[0].ids}
    rows = [index for index, span in enumerate(spans) for _ in range(span.num_tokens)]
    for part in plan.prefill:
        assert {owner[s // BLOCK_SIZE] for s in part.slots_1S.flatten().tolist()} == {rows[part.start]}
    for group in plan.decode:
        for row, slots_S in zip(group.rows_B.tolist(), group.slots_BS.tolist(), strict=True):
            assert {owner[s // BLOCK_SIZE] for s in slots_S} == {rows[row]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 700), st.integers(0, 900)), min_size=1, max_size=5),
    st.sampled_from([None, 16, 300, 512]),
)
def test_the_length_of_a_key_axis_depends_on_the_position_alone(
    parts: list[tuple[int, int]], chunk_size: int | None
) -> None:
    spans = spans_of(parts, chunk_size)
    plan, row = plan_of(spans, chunk_size), 0
    lengths = {row: part.slots_1S.shape[1] for part in plan.prefill for row in range(part.start, part.stop)}
    lengths |= {row: group.slots_BS.shape[1] for group in plan.decode for row in group.rows_B.tolist()}
    for span in spans:
        for position in range(span.num_cached, span.num_cached + span.num_tokens):
            first = 0 if chunk_size is None else position // chunk_size * chunk_size
            assert lengths[row] == padded_keys(position - first + 1)
            row += 1


@pytest.mark.parametrize(("num_keys", "length"), [(1, 64), (64, 64), (65, 128), (200, 256), (257, 512), (1300, 1536)])
def test_key_axes_have_few_lengths(num_keys: int, length: int) -> None:
    assert padded_keys(num_keys) == length


def test_short_sequences_do_not_read_as_many_keys_as_a_long_one() -> None:
    lengths = [50, 60, 100, 3000, 40, 2900, 100_000]
    runs = [QueryRun(sequence=i, row=i, num_queries=1, first_key=0, num_keys=n) for i, n in enumerate(lengths)]
    groups = [[run.num_keys for run in group] for group in decode_groups(runs)]
    assert groups == [[50, 60, 40], [100], [3000, 2900], [100_000]]


def test_many_long_sequences_are_not_gathered_at_once() -> None:
    runs = [QueryRun(sequence=i, row=i, num_queries=1, first_key=0, num_keys=20_000) for i in range(7)]
    groups = list(decode_groups(runs))
    assert all(len(group) * padded_keys(20_000) <= MAX_GATHERED_KEYS for group in groups)
    assert [run for group in groups for run in group] == runs


@pytest.mark.parametrize(
    ("chunk_size", "expected"), [(None, [(0, 20, 0, 31)]), (16, [(0, 2, 16, 15), (2, 16, 32, 1), (18, 2, 48, 1)])]
)
def test_a_span_is_cut_at_chunk_edges(chunk_size: int | None, expected: list[tuple[int, ...]]) -> None:
    runs = query_runs(spans_of([(20, 30)], chunk_size), chunk_size)
    assert [(run.row, run.num_queries, run.first_key, run.num_keys) for run in runs] == expected
