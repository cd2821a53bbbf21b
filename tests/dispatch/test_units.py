"""Copies become one per slice of their expert, slices innermost."""

import torch

from llama4_dist.dispatch.units import expand, name_of, slice_of


def test_each_copy_becomes_one_per_slice_and_its_score_goes_with_it() -> None:
    experts_TK = torch.tensor([[4, 0], [1, 2]])
    scores_TK = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    units_TK, scores = expand(experts_TK, scores_TK, 3)
    assert units_TK.tolist() == [[12, 13, 14, 0, 1, 2], [3, 4, 5, 6, 7, 8]]
    assert scores.tolist() == [[0.5] * 3 + [0.25] * 3, [1.0] * 3 + [2.0] * 3]
    assert units_TK.is_contiguous()
    assert scores.is_contiguous()


def test_no_token_has_no_copies() -> None:
    units_TK, scores = expand(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1), 2)
    assert units_TK.shape == scores.shape == (0, 2)


def test_a_unit_is_named_by_expert_and_slice() -> None:
    assert slice_of(7, 2) == (3, 1)
    assert name_of(7, 2) == "3.1"
    assert name_of(7, 1) == "7"
