"""One rank of a stage as a process: computes a prompt with the others and writes its logits, or fails as it is told.

Usage: rank_process.py CHECKPOINT FOLDER RANK NUM_RANKS TIMEOUT_S FATE, where FATE is compute, die (before the second
step) or wait.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch's stubs leave it out

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import UnavailableError
from llama4_dist.model.kv_layout import layout_of
from llama4_dist.native import threads
from llama4_dist.partition import Partition
from llama4_dist.stages.collective import join_ranks
from llama4_dist.stages.in_process import QueueLink
from llama4_dist.stages.member import StageMember
from llama4_dist.stages.split import split_batch
from tests.model.direct import all_experts
from tests.stages.groups import CountingDirect, num_pages, runner_over, stage_runner


class Alone:
    """A leader's model over one rank: its part of the vocabulary is all there is."""

    def __init__(self, member: StageMember, after: QueueLink) -> None:
        self._member = member
        self._after = after

    def forward(self, batch: object, cache: object, dispatcher: object) -> torch.Tensor:
        (part,) = split_batch(batch, 1)  # type: ignore[arg-type]
        self._member.compute(part)
        rows = self._after.take(1.0).rows
        if isinstance(rows, torch.Tensor):
            return rows
        raise rows


def main(checkpoint_dir: str, folder: str, rank: int, num_ranks: int, timeout_s: float, fate: str) -> None:
    torch.set_num_threads(1)
    threads.set_count(1)
    checkpoint = Checkpoint.open(Path(checkpoint_dir))
    layout = layout_of(checkpoint.config)
    ranks = join_ranks(
        FileStore(f"{folder}/store", -1), rank=rank, num_ranks=num_ranks, device="cpu", timeout_s=timeout_s
    )
    runner = stage_runner(
        checkpoint,
        Partition(num_ranks=num_ranks),
        0,
        rank,
        ranks,
        CountingDirect(all_experts(checkpoint, torch.float32)),
        pages=num_pages(layout, 1, 128),
    )
    after = QueueLink()
    model = Alone(StageMember(runner, before=None, after=after), after)
    sequences = runner_over(model, checkpoint, layout, torch.float32, 1, 128)
    token_ids = list(range(50))
    logits = list(sequences.run([(0, token_ids[:41])]))
    print("first step", flush=True)
    if fate == "die":
        os._exit(9)
    if fate == "wait":
        sys.stdin.read()
    try:
        for token_id in token_ids[41:]:
            logits += sequences.run([(0, [token_id])])
    except UnavailableError as error:
        print(error.reason, flush=True)
        os._exit(3)
    save_file({"logits": torch.cat(logits).contiguous()}, f"{folder}/{rank}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), sys.argv[6])
