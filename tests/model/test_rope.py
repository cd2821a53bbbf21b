"""Frequencies, rotation and temperature against transformers and against numbers one can check by hand."""

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

from llama4_dist.config import RopeScaling
from llama4_dist.model.rope import frequencies, query_temperature, rotate, rotation_table


def scaling(factor: float, low: float, high: float) -> RopeScaling:
    return RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=8192)


@pytest.mark.parametrize(("factor", "low", "high"), [(8.0, 1.0, 4.0), (32.0, 0.5, 2.0), (16.0, 1.0, 1.0)])
def test_scaled_frequencies_are_those_of_transformers_with_and_without_a_band(
    factor: float, low: float, high: float
) -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }
    config = Llama4TextConfig(head_dim=128, rope_parameters=parameters)
    expected_C, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    torch.testing.assert_close(frequencies(128, 500000.0, scaling(factor, low, high)), expected_C, rtol=1e-6, atol=0)


def test_the_published_scaling_divides_pairs_35_to_63_by_16() -> None:
    ratio_C = frequencies(128, 500000.0, None) / frequencies(128, 500000.0, scaling(16.0, 1.0, 1.0))
    torch.testing.assert_close(ratio_C, torch.tensor([1.0] * 35 + [16.0] * 29))


def test_adjacent_pairs_turn_by_position_times_frequency() -> None:
    table = rotation_table(torch.tensor([0, 2]), torch.tensor([math.pi / 4, math.pi / 2]))
    x_THC = torch.tensor([[[1.0, 0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0, 1.0]]])
    expected = torch.tensor([[[1.0, 0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0, -1.0]]])
    torch.testing.assert_close(rotate(x_THC, table), expected, atol=1e-6, rtol=0)


def test_temperature_rises_with_the_token_that_completes_a_floor() -> None:
    values = query_temperature(torch.tensor([0, 8190, 8191, 16383]), 8192, 0.1)
    expected = torch.tensor([1.0, 1.0, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3)])
    torch.testing.assert_close(values, expected)
