"""A new checkpoint appears whole or not at all, whatever the disk, the caller or a signal does."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.writing import directory, parts
from llama4_dist.errors import CheckpointError, ConfigError, PreconditionError
from tests.checkpoint.writing.models import narrow
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
BIG = ["--preset", "scout", "--scale", "1/16", "--set", "num_hidden_layers=4", "--dtype", "float32", "--out", "model"]
SLOW_DISK = "import os, time; write = os.pwrite; os.pwrite = lambda *what: (time.sleep(1.0), write(*what))[1]"


def run_synth(folder: Path, *arguments: str, before: str = "") -> subprocess.Popen[str]:
    code = f"{before}\nfrom llama4_dist.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "checkpoint", "synth", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    with run_synth(tmp_path, *BIG, before=SLOW_DISK) as process:  # which all of it would fill in a minute and a half
        wait_until(lambda: list(tmp_path.glob(".model.partial-*/model*.safetensors")), "a file is begun")
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_file_sizes_is_reported_before_the_first_byte(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    with run_synth(tmp_path, *BIG, before=limit) as process:
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert "--shard-size" in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    write = os.pwrite

    def full(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PreconditionError, match="full: free some") as caught:
        narrow(tmp_path / "model")
    assert caught.value.reason == "DISK_FULL"
    assert list(tmp_path.iterdir()) == []


def test_too_little_free_space_is_found_before_the_first_byte(tmp_path: Path) -> None:
    from llama4_dist.checkpoint.writing.synth import SynthRequest, synthesise

    with pytest.raises(PreconditionError, match=r"3,983,458,.* bytes are to be written") as caught:
        synthesise(SynthRequest(preset="behemoth"), tmp_path / "model")
    assert caught.value.reason == "DISK_FULL"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_holes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "allocated_bytes", lambda path: path.stat().st_size)
    with pytest.raises(PreconditionError, match="no sparse files"):
        narrow(tmp_path / "model", is_sparse=True)
    narrow(tmp_path / "model")  # nothing of it would be a hole
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_directory_that_is_not_empty_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    narrow(tmp_path / "model")  # an empty one is taken
    before = sorted((tmp_path / "model").iterdir())
    with pytest.raises(ConfigError, match="not empty"):
        narrow(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        narrow(tmp_path / "file")
    with pytest.raises(ConfigError, match="make it first"):
        narrow(tmp_path / "absent" / "model")
    assert sorted((tmp_path / "model").iterdir()) == before


def test_a_link_is_not_followed_to_somewhere_else(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="not empty"):
        narrow(tmp_path / "model")


@pytest.mark.parametrize("damage", ["cut", "replaced"])
def test_an_original_that_changes_is_not_copied(tmp_path: Path, damage: str) -> None:
    narrow(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    plan = parts.plan_whole(checkpoint)
    shard = tmp_path / "model" / "model.safetensors"
    actions: dict[str, Callable[[], object]] = {
        "cut": lambda: os.truncate(shard, shard.stat().st_size - 4),
        "replaced": lambda: shard.write_bytes(shard.read_bytes()),
    }
    actions[damage]()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        parts.write_parts(checkpoint, [plan], tmp_path / "copy", shard_bytes=10**9)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
