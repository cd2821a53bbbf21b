"""The family's geometries have the sizes that were published, and Behemoth those this project states."""

from math import prod

import pytest

from llama4_dist.checkpoint.describe import num_idle_parameters
from llama4_dist.checkpoint.names import expected_tensors
from llama4_dist.checkpoint.presets import PRESETS, preset
from tests.checkpoint import published


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("scout", 107_769_861_120, 17_172_894_720),
        ("maverick", 400_711_848_960, 17_184_691_200),
        ("behemoth", 1991.73e9, 288.5e9),
    ],
)
def test_a_preset_has_the_parameters_that_are_stated_for_it(name: str, total: float, active: float) -> None:
    config = preset(name)
    num_parameters = sum(prod(shape) for shape in expected_tensors(config).values())
    assert num_parameters == pytest.approx(total, rel=1e-4)
    assert num_parameters - num_idle_parameters(config) == pytest.approx(active, rel=1e-3)


@pytest.mark.parametrize(("name", "file"), [("scout", published.SCOUT), ("maverick", published.MAVERICK)])
def test_a_preset_is_the_published_text_model(name: str, file: dict[str, object]) -> None:
    text = file["text_config"]
    assert isinstance(text, dict)
    for key in text.keys() & PRESETS[name].keys() - {"model_type"}:
        assert PRESETS[name][key] == text[key], key


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'giant'.*scout, maverick, behemoth"):
        preset("giant")
