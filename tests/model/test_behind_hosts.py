"""The model behind real expert hosts gives the bits it gives with experts computed on the spot."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.inproc_hosts import start_inproc_hosts
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner


@pytest.mark.parametrize("preset", ["scout", "maverick", "topk2"])
@pytest.mark.parametrize("num_hosts", [1, 3])
def test_logits_do_not_depend_on_where_experts_live(tmp_path: Path, preset: str, num_hosts: int) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, preset))
    token_ids = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    runner = Runner.load(checkpoint)
    expected_TV = runner.in_chunks(token_ids, [41, 1])
    with ExitStack() as resources:
        dispatcher, _ = start_inproc_hosts(
            checkpoint, num_hosts=num_hosts, dtype=torch.float32, device="cpu", resources=resources
        )
        behind_hosts = Runner(runner.model, dispatcher, runner.cache, runner.max_tokens, runner.sequences)
        behind_hosts.restart()
        assert torch.equal(behind_hosts.in_chunks(token_ids, [41, 1]), expected_TV)
