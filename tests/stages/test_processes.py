"""Ranks in processes that gather by gloo give the bits of ranks in threads, and learn at once when one dies."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch's stubs leave it out

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import UnavailableError
from llama4_dist.partition import Partition
from llama4_dist.stages.collective import join_ranks
from tests.checkpoints import make_checkpoint
from tests.stages.groups import running_group

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("maverick"), "maverick")


@pytest.fixture
def start(model_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a process for each fate."""
    processes: list[subprocess.Popen[str]] = []

    def started(*fates: str, timeout_s: float = 30.0) -> list[subprocess.Popen[str]]:
        for rank, fate in enumerate(fates):
            command = [sys.executable, "-m", "tests.stages.rank_process", str(model_dir), str(tmp_path)]
            processes.append(
                subprocess.Popen(
                    [*command, str(rank), str(len(fates)), str(timeout_s), fate],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        return processes

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def test_processes_give_the_bits_of_threads(start: Start, model_dir: Path, tmp_path: Path) -> None:
    for process in start("compute", "compute"):
        assert process.wait(120) == 0
    columns = [load_file(tmp_path / f"{rank}.safetensors")["logits"] for rank in range(2)]
    with running_group(Checkpoint.open(model_dir), Partition(num_ranks=2)) as group:
        assert torch.equal(torch.cat(columns, dim=1), group.in_chunks(list(range(50)), [41, 1]))


def test_a_rank_that_dies_is_lost_to_the_others_at_once(start: Start) -> None:
    """Long before the timeout: the kernel closes its connections."""
    first, second = start("compute", "die")
    assert second.wait(120) == 9
    died_s = time.monotonic()
    assert first.wait(60) == 3
    assert time.monotonic() - died_s < 20.0
    assert first.stdout is not None
    assert first.stdout.read().split("\n")[:2] == ["first step", "WORKER_LOST"]


def test_a_rank_that_stands_still_is_lost_after_the_timeout(start: Start) -> None:
    """It can only be killed then: its own thread waits in a call that nothing wakes."""
    first, second = start("compute", "wait", timeout_s=3.0)
    assert first.wait(120) == 3
    assert second.poll() is None


def test_ranks_that_do_not_meet_are_told(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"did not meet in 0\.5 s"):
        join_ranks(FileStore(str(tmp_path / "store"), -1), rank=0, num_ranks=2, device="cpu", timeout_s=0.5)
