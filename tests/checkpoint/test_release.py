"""Giving the memory of one expert back: its views read the file again, its neighbours are not touched."""

from pathlib import Path

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.plain_experts import plain


@pytest.fixture(params=["fused", "per_expert"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path, "scout", layout=request.param))


def test_views_of_a_released_expert_read_the_file_again(checkpoint: Checkpoint) -> None:
    experts = [plain(checkpoint.expert(1, expert)) for expert in range(16)]
    before = [(one.gate_DF.clone(), one.up_DF.clone(), one.down_FD.clone()) for one in experts]
    for expert in (0, 7, 15):
        checkpoint.release_expert(1, expert)
    for one, (gate_DF, up_DF, down_FD) in zip(experts, before, strict=True):
        assert torch.equal(one.gate_DF, gate_DF)
        assert torch.equal(one.up_DF, up_DF)
        assert torch.equal(one.down_FD, down_FD)


def test_an_expert_that_was_never_read_and_a_closed_checkpoint_have_nothing_to_release(checkpoint: Checkpoint) -> None:
    checkpoint.release_expert(0, 3)
    checkpoint.expert(0, 3)
    checkpoint.close()
    checkpoint.release_expert(0, 3)
