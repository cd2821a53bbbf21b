import json
import math
from typing import Any

import pytest

from llama4_dist.checkpoint.config_file import parse_config
from llama4_dist.checkpoint.describe import num_idle_parameters
from llama4_dist.checkpoint.names import ExpertLayout, expected_tensors
from llama4_dist.config import ModelConfig
from tests.checkpoint.published import BEHEMOTH, MAVERICK, SCOUT
from tests.checkpoints import text_shapes
from tests.presets import BASE, PRESETS


def config_of(content: Any) -> ModelConfig:
    return parse_config(json.dumps(content).encode())


def num_parameters(config: ModelConfig, layout: ExpertLayout) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(config, layout).values())


@pytest.mark.parametrize("layout", ExpertLayout)
@pytest.mark.parametrize(
    ("content", "total", "active"),
    [(SCOUT, 107_769_861_120, 17_172_894_720), (MAVERICK, 400_711_848_960, 17_184_691_200)],
    ids=["scout", "maverick"],
)
def test_the_published_models_have_their_published_number_of_parameters(
    content: Any, total: int, active: int, layout: ExpertLayout
) -> None:
    config = config_of(content)
    assert num_parameters(config, layout) == total
    assert total - num_idle_parameters(config) == active


def test_the_behemoth_geometry_has_about_two_trillion_parameters_and_288_billion_active() -> None:
    config = config_of(BEHEMOTH)
    text = num_parameters(config, ExpertLayout.FUSED)
    vision = 850_960_896 + 16384 * 4096  # the published encoder, and a projector to the wider model
    assert round((text + vision) / 1e9, 1) == 1992.6
    assert round((text - num_idle_parameters(config)) / 1e9, 1) == 288.5


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"conditional", "v5"}))
def test_names_and_shapes_are_those_that_transformers_loads(preset: str) -> None:
    """tests/test_presets.py shows that transformers loads exactly `text_shapes`."""
    text = BASE | PRESETS[preset]
    config = config_of(text | {"architectures": ["Llama4ForCausalLM"], "dtype": "float32"})
    assert expected_tensors(config) == text_shapes(text)
