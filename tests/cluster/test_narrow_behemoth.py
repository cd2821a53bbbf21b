"""A narrow Behemoth (synthetic geometry) in four stages of two ranks over Ray, as its benchmark runs it."""

import argparse
from pathlib import Path

import pytest

from benchmarks.narrow_behemoth import measure

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_four_stages_of_two_ranks_have_the_tokens_of_one_process_through_two_deaths(tmp_path: Path) -> None:
    arguments = argparse.Namespace(stages=4, tensor=2, hosts=4, slices=2, layers=24, max_tokens=12)
    seen = measure(arguments, tmp_path)
    assert (seen["lost"], seen["equal_to_same_cut"], seen["requests"]) == (0, 24, 24)
    assert seen["processes"] == 1 + 1 + 8 + 4
    assert seen["formation"] == 2, "the host's death is not the group's"
