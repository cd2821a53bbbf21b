"""Tables of a step by hand: which queries share a tile, where a chunk cuts them, what padding looks like."""

import numpy as np
import torch

from llama4_dist.gpu.step_tables import TableWriter, extent_of
from llama4_dist.model.batch import PageRun, SequenceSpan


def span(num_tokens: int, num_cached: int, *pages: tuple[int, tuple[int, ...]]) -> SequenceSpan:
    runs = tuple(PageRun(first_block=first, ids=ids) for first, ids in pages)
    return SequenceSpan(num_tokens=num_tokens, num_cached=num_cached, pages=runs)


def tables(spans: list[SequenceSpan], num_rows: int) -> dict[str, np.ndarray]:
    writer = TableWriter(extent_of(spans, num_rows), chunk_size=8, per_tile=4, device=torch.device("cpu"))
    return writer.host_tables(range(100, 100 + sum(one.num_tokens for one in spans)), spans)


def test_a_prompt_is_cut_into_tiles_and_at_chunk_edges() -> None:
    found = tables([span(7, 5, (0, (3, 1, 2)), (0, (4, 5, 6)))], 7)
    assert found["prefill_full"].tolist() == [[0, 5, 4, 0, 0], [4, 9, 3, 0, 0]]
    # Positions 5 to 7 see the first chunk, 8 to 11 the second.
    assert found["prefill_chunked"].tolist() == [[0, 5, 3, 0, 0], [3, 8, 4, 8, 0]]
    assert found["decode_full"].tolist() == found["decode_chunked"].tolist() == []


def test_a_single_last_query_is_a_decode_like_any_other() -> None:
    found = tables([span(5, 0, (0, (3,)))], 5)
    assert found["prefill_full"].tolist() == [[0, 0, 4, 0, 0]]
    assert found["decode_full"].tolist() == [[4, 4, 1, 0, 0]]


def test_each_group_has_its_run_of_pages_and_padding_rows_no_sequence() -> None:
    spans = [span(1, 17, (0, (7, 9)), (1, (4,))), span(1, 3, (0, (2,)), (0, (8,)))]
    found = tables(spans, 4)
    assert found["page_tables"][:, :2].tolist() == [[[7, 9], [2, 0]], [[4, 0], [8, 0]]]
    assert found["first_pages"][:, :2].tolist() == [[0, 0], [1, 0]]
    assert found["positions_T"].tolist() == [17, 3, 0, 0]
    assert found["sequences_T"].tolist() == [0, 1, -1, -1]
    assert found["decode_chunked"].tolist() == [[0, 17, 1, 16, 0], [1, 3, 1, 0, 1], [0] * 5, [0] * 5]


def test_steps_of_like_size_have_tables_of_one_layout() -> None:
    writer = TableWriter(extent_of([span(1, 17, (0, (7, 9)))], 4), chunk_size=8, per_tile=4, device=torch.device("cpu"))
    first = writer.write([1], [span(1, 17, (0, (7, 9)))])
    second = writer.write([5, 6], [span(1, 30, (0, (2, 3))), span(1, 2, (0, (4,)))], first.memory)
    assert second.memory.data_ptr() == first.memory.data_ptr()
    assert first.tokens_T.tolist() == [5, 6, 0, 0]
    assert first.page_tables[0].tolist() == [[2, 3], [4, 0], [0, 0], [0, 0]]
