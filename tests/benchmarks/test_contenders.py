"""Contenders in processes of their own, on a tiny checkpoint."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from benchmarks.compare import OURS, TRANSFORMERS, measure
from benchmarks.contenders.process import ROOT, Contender
from benchmarks.workloads import decode, prefill
from tests.checkpoints import make_checkpoint


@pytest.fixture
def contenders(tmp_path: Path) -> Iterator[list[Contender]]:
    model_dir = str(make_checkpoint(tmp_path, "scout", vocab_size=8192))
    with (
        closing(Contender(OURS, "engine", [model_dir, "1", "4"], log=tmp_path / "a.log", threads=1)) as ours,
        closing(
            Contender(TRANSFORMERS, "reference", [model_dir, "float32", "1"], log=tmp_path / "b.log", threads=1)
        ) as b,
    ):
        yield [ours, b]


def test_both_compute_the_same_tokens_and_only_one_runs(contenders: list[Contender]) -> None:
    speeds, agreed, _ = measure(contenders, [prefill(20), decode(2, 5)], rounds=1)
    # Two rounds with the one that warms up: a prompt's next token, and five tokens of each of two sequences.
    assert (agreed[TRANSFORMERS].num_sequences, agreed[TRANSFORMERS].num_tokens) == (6, 22)
    assert (agreed[TRANSFORMERS].num_first_equal, agreed[TRANSFORMERS].num_equal) == (6, 22)
    assert all(len(speed.rounds) == 1 and speed.median > 0 for of_one in speeds.values() for speed in of_one.values())
    assert [stopped(contender) for contender in contenders] == [True, True]


def test_a_contender_that_cannot_start_is_named_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)ours ended with 1.*no-such-checkpoint"):
        Contender("ours", "engine", [str(tmp_path / "no-such-checkpoint"), "1", "1"], log=tmp_path / "log", threads=1)


def test_a_contender_that_fails_in_a_call_is_named(contenders: list[Contender]) -> None:
    with pytest.raises(SystemExit, match="transformers failed: IndexError"):
        contenders[1].ask([[10**6]], 1)


@pytest.mark.skipif(sys.platform != "linux", reason="relies on the parent-death signal")
def test_a_stopped_contender_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "scout")
    script = (
        "from pathlib import Path; from benchmarks.contenders.process import ROOT, Contender; import sys\n"
        "contender = Contender('ours', 'engine', [sys.argv[1], '1', '1'], log=Path(sys.argv[2]), threads=1)\n"
        "print(contender.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(model_dir), str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert not alive, "it would stand still for ever"
    assert gone == [child]


def stopped(contender: Contender) -> bool:
    """Whether the kernel has it stopped; the signal takes a moment to arrive."""
    until = time.monotonic() + 5
    while psutil.Process(contender.pid).status() != psutil.STATUS_STOPPED:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
