"""Experts cut into slices in one process: scores have one set of bits on any hosts, close to those of whole experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from tests.checkpoints import make_checkpoint
from tests.native.compiler import needs_compiler

IDS = tuple((7 * i + 3) % 256 for i in range(60))


def scores(path: Path, **fields: Any) -> Tensor:
    engine = build_single_process(path, options=EngineOptions(num_blocks=60), num_threads=1, **fields)
    try:
        engine.start(lambda outputs: None)
        return engine.score(IDS)
    finally:
        engine.close()


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("preset", ["scout", "topk2"])
def test_in_float32_a_cut_only_reorders_sums(tmp_path: Path, preset: str, layout: str) -> None:
    path = make_checkpoint(tmp_path, preset, layout=layout)
    whole = scores(path)
    for num_slices in (2, 3, 6):
        cut = scores(path, expert_slices=num_slices)
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)
        assert not torch.equal(cut, whole), "nothing was cut"
        for num_hosts in (2, 5):
            assert torch.equal(scores(path, expert_slices=num_slices, num_inproc_hosts=num_hosts), cut)


@needs_compiler
@pytest.mark.parametrize("fields", [{}, {"weights": "int8"}], ids=["stored", "int8"])
def test_in_bfloat16_and_int8_a_cut_has_one_result_on_any_hosts(tmp_path: Path, fields: dict[str, str]) -> None:
    path = make_checkpoint(tmp_path, "scout", dtype=torch.bfloat16)
    cut = scores(path, expert_slices=4, **fields)
    for num_hosts in (2, 3):
        assert torch.equal(scores(path, expert_slices=4, num_inproc_hosts=num_hosts, **fields), cut)
    assert not torch.equal(scores(path, **fields), cut), "nothing was cut"


def test_partial_outputs_of_bfloat16_are_about_as_close_to_float32_as_whole_experts(tmp_path: Path) -> None:
    """Each partial output is rounded before it is added; the median leaves out tokens that chose another expert."""
    path = make_checkpoint(tmp_path, "scout", dtype=torch.bfloat16)
    exact = scores(path, dtype="float32")
    whole, cut = ((scores(path, expert_slices=num_slices) - exact).abs().median() for num_slices in (1, 4))
    assert cut < 1.25 * whole


@pytest.mark.parametrize("num_slices", [0, -2, 97])
def test_a_cut_that_does_not_fit_is_refused(tmp_path: Path, num_slices: int) -> None:
    with pytest.raises(ConfigError, match=f"expert_slices={num_slices} does not fit experts 96 wide"):
        build_single_process(make_checkpoint(tmp_path, "scout"), expert_slices=num_slices)
