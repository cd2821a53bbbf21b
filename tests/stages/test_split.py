"""A step's parts hold all its tokens and all its logit rows, each once and in order."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.stages.split import split_batch


def whole_batch(counts: list[int], step: int = 1, logit_rows: tuple[int, ...] = ()) -> Batch:
    return Batch(
        step=step,
        token_ids_T=torch.arange(sum(counts)),
        spans=tuple(SequenceSpan(num_tokens=count, num_cached=100 * i, pages=()) for i, count in enumerate(counts)),
        logit_rows=logit_rows,
    )


def batch_of(counts: list[int], *, step: int, num_parts: int) -> tuple[Batch, ...]:
    return split_batch(whole_batch(counts, step), num_parts)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    num_parts=st.integers(1, 5),
    num_microbatches=st.integers(1, 2),
    draw=st.data(),
)
def test_parts_hold_each_token_and_each_logit_row_once(
    counts: list[int], num_parts: int, num_microbatches: int, draw: st.DataObject
) -> None:
    wanted = tuple(sorted(draw.draw(st.sets(st.integers(0, sum(counts) - 1)))))
    batch = replace(whole_batch(counts, logit_rows=wanted), num_microbatches=num_microbatches)
    parts = split_batch(batch, num_parts)
    assert torch.equal(torch.cat([part.token_ids_T for part in parts]), batch.token_ids_T)
    found = [int(part.token_ids_T[row]) for part in parts for row in part.logit_rows]
    assert found == list(wanted), "token ids are row numbers here"
    assert all(sum(span.num_tokens for span in part.spans) == len(part.token_ids_T) > 0 for part in parts)
    numbers = [part.first_microbatch + i for part in parts for i in range(num_microbatches)]
    assert numbers == list(range(len(parts) * num_microbatches)), "two parts share a name"


def test_a_step_in_one_part_stays_as_it_is() -> None:
    batch = whole_batch([3, 2], logit_rows=(2, 4))
    assert split_batch(batch, 1) == (batch,)


def test_logit_rows_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logit_rows=\(4, 2\) must ascend"):
        split_batch(whole_batch([5], logit_rows=(4, 2)), 2)
