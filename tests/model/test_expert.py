"""Routed experts: layouts, slices and groups give one answer; experts without rows are not touched."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model import expert as expert_module
from llama4_dist.model import few_rows
from llama4_dist.model.expert import Experts
from tests.checkpoints import make_checkpoint
from tests.native.compiler import needs_compiler

D, F = 64, 96
GROUPS = [(3, 1), (0, 0), (7, 6), (5, 0), (1, 2)]
X_RD = torch.randn(9, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["fused", "per_expert"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("scout"), "scout", layout=request.param)
    return Checkpoint.open(path)


def run(checkpoint: Checkpoint, start: int = 0, stop: int = F, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weights = {(1, e): checkpoint.expert(1, e, start, stop) for e in range(16)}
    out_RD = torch.full((9, D), float("nan"), dtype=dtype)
    Experts(weights, width=D, dtype=dtype, device="cpu")(1, GROUPS, X_RD.to(dtype), out_RD)
    return out_RD


def test_each_group_is_computed_by_its_expert(checkpoint: Checkpoint) -> None:
    out_RD, start = run(checkpoint), 0
    for expert, num_rows in GROUPS:
        weights, x_RD = checkpoint.expert(1, expert), X_RD[start : start + num_rows]
        gate_RF, up_RF = x_RD @ weights.gate_DF, x_RD @ weights.up_DF
        expected_RD = (gate_RF / (1 + torch.exp(-gate_RF)) * up_RF) @ weights.down_FD
        torch.testing.assert_close(out_RD[start : start + num_rows], expected_RD, rtol=1e-5, atol=1e-5)
        start += num_rows


def test_slices_of_the_width_add_up_to_the_whole(checkpoint: Checkpoint) -> None:
    parts = run(checkpoint, 0, 40) + run(checkpoint, 40, F)
    torch.testing.assert_close(parts, run(checkpoint), rtol=1e-5, atol=1e-5)


def test_a_wider_compute_dtype_is_cast_once_when_held(checkpoint: Checkpoint) -> None:
    torch.testing.assert_close(run(checkpoint, dtype=torch.bfloat16).float(), run(checkpoint), rtol=0.05, atol=0.05)


def test_experts_without_rows_are_never_computed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[int]] = []
    honest = expert_module.apply_experts

    def counting(
        x_RD: torch.Tensor, nums_rows: Sequence[int], weights: Sequence[ExpertWeights], out_RD: torch.Tensor
    ) -> None:
        rows.append(list(nums_rows))
        honest(x_RD, nums_rows, weights, out_RD)

    monkeypatch.setattr(expert_module, "apply_experts", counting)
    run(checkpoint)
    assert rows == [[1, 6, 2]]


@pytest.mark.parametrize(
    ("nums_rows", "expected"),
    [([1, 2, 3], [[1, 2, 3]]), ([1, 900, 0, 2, 3], [[1], [900], [2, 3]]), ([0, 0], []), ([900, 901], [[900], [901]])],
)
def test_neighbours_of_few_rows_are_computed_together(nums_rows: list[int], expected: list[list[int]]) -> None:
    assert [[rows for _, rows in run] for run in expert_module.runs(list(enumerate(nums_rows)))] == expected


@needs_compiler
def test_the_first_rows_wait_for_no_compiler_and_no_trial(checkpoint: Checkpoint) -> None:
    few_rows.exact_sums.cache_clear()
    experts = Experts({(1, 0): checkpoint.expert(1, 0)}, width=D, dtype=torch.float32, device="cpu")
    assert few_rows.exact_sums.cache_info().misses == 2  # D and F
    experts(1, [(0, 3)], torch.zeros(3, D), torch.zeros(3, D))
    assert few_rows.exact_sums.cache_info().misses == 2


def test_weights_of_the_compute_dtype_are_not_copied(checkpoint: Checkpoint) -> None:
    weights = checkpoint.expert(0, 2)
    experts = Experts({(0, 2): weights}, width=D, dtype=torch.float32, device="cpu")
    held = experts._weights[0, 2]
    assert experts.holds == {(0, 2)}
    assert held.down_FD.data_ptr() == weights.down_FD.data_ptr()
    assert held.gate_DF.data_ptr() == weights.gate_DF.data_ptr()


def test_groups_that_do_not_cover_the_rows_are_our_own_bug(checkpoint: Checkpoint) -> None:
    experts = Experts({(1, 0): checkpoint.expert(1, 0)}, width=D, dtype=torch.float32, device="cpu")
    with pytest.raises(AssertionError, match="cover"):
        experts(1, [(0, 3)], torch.zeros(4, D), torch.zeros(4, D))
