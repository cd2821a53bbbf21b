"""The figures on int8 weights, on numbers a reader can check by hand."""

import math

import pytest
import torch

from benchmarks.int8 import differences, ratios


def test_the_difference_of_logits_is_counted_by_position() -> None:
    stored_PV = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])  # probabilities of 1/4 and 3/4
    int8_PV = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])
    found = differences(stored_PV, int8_PV)
    assert found["positions"] == 2
    assert found["max_logit_difference"] == pytest.approx(math.log(3.0))
    assert found["mean_logit_difference"] == pytest.approx(math.log(3.0) / 2)
    assert found["equal_greedy_tokens"] == 0.5
    # 1/4 · ln(1/4 : 3/4) + 3/4 · ln(3/4 : 1/4) = ln 3 / 2 in one position of two
    assert found["mean_kl_divergence"] == pytest.approx(math.log(3.0) / 4)


def test_a_ratio_is_taken_within_a_round() -> None:
    assert ratios([10.0, 100.0, 40.0], [20.0, 300.0, 100.0]).rounds == (2.0, 3.0, 2.5)
