"""Routed experts: layouts, slices and groups give one answer; experts without rows are not touched."""

from pathlib import Path

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.expert import Experts
from tests.checkpoints import make_checkpoint
from tests.plain_experts import plain

D, F = 64, 96
GROUPS = [(3, 1), (0, 0), (7, 6), (5, 0), (1, 2)]
X_RD = torch.randn(9, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["fused", "per_expert"])
def checkpoint(arithmetic: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
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
        weights, x_RD = plain(checkpoint.expert(1, expert)), X_RD[start : start + num_rows]
        gate_RF, up_RF = x_RD @ weights.gate_DF, x_RD @ weights.up_DF
        expected_RD = (gate_RF / (1 + torch.exp(-gate_RF)) * up_RF) @ weights.down_FD
        torch.testing.assert_close(out_RD[start : start + num_rows], expected_RD, rtol=1e-5, atol=1e-5)
        start += num_rows


def test_slices_of_the_width_add_up_to_the_whole(checkpoint: Checkpoint) -> None:
    parts = run(checkpoint, 0, 40) + run(checkpoint, 40, F)
    torch.testing.assert_close(parts, run(checkpoint), rtol=1e-5, atol=1e-5)


def test_a_wider_compute_dtype_is_cast_once_when_held(checkpoint: Checkpoint) -> None:
    torch.testing.assert_close(run(checkpoint, dtype=torch.bfloat16).float(), run(checkpoint), rtol=0.05, atol=0.05)


def test_experts_without_rows_are_never_computed(checkpoint: Checkpoint) -> None:
    experts = Experts({(1, e): checkpoint.expert(1, e) for e in (1, 3, 7)}, width=D, dtype=torch.float32, device="cpu")
    experts(1, GROUPS, X_RD, torch.empty(9, D))  # of the five, three are held


def test_weights_of_the_compute_dtype_are_not_copied(checkpoint: Checkpoint) -> None:
    weights = plain(checkpoint.expert(0, 2))
    experts = Experts({(0, 2): weights}, width=D, dtype=torch.float32, device="cpu")
    held = plain(experts.weights(0, 2))
    assert experts.holds == {(0, 2)}
    assert held.down_FD.data_ptr() == weights.down_FD.data_ptr()
    assert held.gate_DF.data_ptr() == weights.gate_DF.data_ptr()


def test_groups_that_do_not_cover_the_rows_are_our_own_bug(checkpoint: Checkpoint) -> None:
    experts = Experts({(1, 0): checkpoint.expert(1, 0)}, width=D, dtype=torch.float32, device="cpu")
    with pytest.raises(AssertionError, match="cover"):
        experts(1, [(0, 3)], torch.zeros(4, D), torch.zeros(4, D))
