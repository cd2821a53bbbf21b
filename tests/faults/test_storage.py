"""Faults of files and disks hold, heal to the last bit, and are refused when they hit another file."""

import mmap
from pathlib import Path

import pytest

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import CheckpointError
from tests.checkpoints import make_checkpoint
from tests.faults.fault import FaultNotVerified, offered
from tests.faults.storage import ROOT, FlippedBit, FullDisk, SmallDisk, Swapped, Truncated, digest
from tests.faults.victims import victim


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return sorted(make_checkpoint(tmp_path / "model", "scout").glob("*.safetensors"))


def test_a_flipped_bit_is_one_bit_seen_through_a_mapping_too(shards: list[Path]) -> None:
    whole = shards[0].read_bytes()
    with shards[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with FlippedBit(shards[0], seed=5) as fault:
            differences = [(a ^ b).bit_count() for a, b in zip(whole, mapped[:], strict=True) if a != b]
            assert differences == [1]
            assert fault.offset >= len(whole) // 2
        assert mapped[:] == whole


def test_a_bit_flipped_in_another_shard_is_noticed_and_undone(shards: list[Path]) -> None:
    before = digest(shards[1])
    with pytest.raises(FaultNotVerified, match="as it was"), FlippedBit(shards[0], aim=shards[1]):
        pass
    assert digest(shards[1]) == before


def test_reading_a_mapping_of_a_truncated_file_kills_its_reader_alone(shards: list[Path]) -> None:
    code = (
        "import mmap, sys\n"
        f"file = open({str(shards[0])!r}, 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "print('mapped', flush=True)\nsys.stdin.readline()\nsum(mapped[:])"
    )
    with victim(code) as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        assert reader.stdout.readline() == b"mapped\n"
        with Truncated(shards[0], num_bytes=100):
            reader.stdin.write(b"\n")
            assert reader.wait(60) == -7, "SIGBUS"
            with pytest.raises(CheckpointError, match="header"):
                Checkpoint.open(shards[0].parent)
        Checkpoint.open(shards[0].parent).close()


def test_truncating_another_file_is_noticed_and_undone(shards: list[Path]) -> None:
    before = digest(shards[1])
    with pytest.raises(FaultNotVerified, match="not 100"), Truncated(shards[0], num_bytes=100, aim=shards[1]):
        pass
    assert digest(shards[1]) == before


def test_swapped_shards_are_a_damaged_checkpoint_until_swapped_back(shards: list[Path]) -> None:
    with Swapped(shards[0], shards[1]), pytest.raises(CheckpointError):
        Checkpoint.open(shards[0].parent)
    Checkpoint.open(shards[0].parent).close()


def test_a_swap_with_itself_is_noticed_and_one_of_twins_refused(shards: list[Path]) -> None:
    with pytest.raises(FaultNotVerified, match="changed places"), Swapped(shards[0], shards[1], aim=shards[0]):
        pass
    Checkpoint.open(shards[0].parent).close()
    twin = shards[0].with_name("twin")
    twin.write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match="alike"):
        Swapped(shards[0], twin)


def test_a_full_disk_takes_nothing_and_then_takes_again(tmp_path: Path) -> None:
    with offered(SmallDisk, tmp_path / "disk") as folder:
        with FullDisk(folder), pytest.raises(OSError, match="No space left"):
            (folder / "log").write_bytes(b"event")
        (folder / "log").write_bytes(b"event")
    assert not (tmp_path / "disk").is_mount()


def test_filling_another_disk_is_noticed_and_a_large_one_refused(tmp_path: Path) -> None:
    with offered(SmallDisk, tmp_path / "one") as one, offered(SmallDisk, tmp_path / "two") as two:
        with pytest.raises(FaultNotVerified, match="still takes"), FullDisk(one, aim=two):
            pass
        assert not list(two.iterdir())
    with pytest.raises(ValueError, match="no small disk"):
        FullDisk(tmp_path)


def test_files_of_the_repository_are_refused() -> None:
    with pytest.raises(ValueError, match="damage a copy"):
        FlippedBit(ROOT / "README.md")
