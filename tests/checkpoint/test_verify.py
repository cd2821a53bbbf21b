import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.verify import MANIFEST
from llama4_dist.errors import CheckpointError
from tests.checkpoints import make_checkpoint

SECOND = "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


def write_manifest(path: Path) -> None:
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (path / MANIFEST).write_text("".join(lines))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = make_checkpoint(tmp_path / "model", "scout", num_hidden_layers=1)
    write_manifest(path)
    return path


def refused(path: Path, *, file: str, cause: str, tensor: str = "") -> None:
    with pytest.raises(CheckpointError, match=cause) as caught:
        Checkpoint.open(path).verify()
    assert (caught.value.file, caught.value.tensor) == (file, tensor)


def test_a_whole_checkpoint_passes_and_reports_every_byte(path: Path) -> None:
    calls: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(path)
    checkpoint.verify(lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    file_bytes = sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST)
    assert calls[-1] == (file_bytes + checkpoint.total_bytes,) * 2
    assert checkpoint.bytes_mapped == 0


@pytest.mark.parametrize("name", [SECOND, "config.json", "generation_config.json"])
def test_c14_one_flipped_bit_is_found_in_any_listed_file(path: Path, name: str) -> None:
    raw = bytearray((path / name).read_bytes())
    position = -2 if name == SECOND else raw.index(b"5" if name == "config.json" else b"9")
    raw[position] ^= 1  # a mantissa bit, or a digit that becomes another digit
    (path / name).write_bytes(raw)
    refused(path, file=name, cause="SHA-256")


def test_c14_a_flipped_mantissa_bit_is_not_found_without_a_manifest(path: Path) -> None:
    """Why the manifest exists."""
    raw = bytearray((path / SECOND).read_bytes())
    raw[-2] ^= 1
    (path / SECOND).write_bytes(raw)
    (path / MANIFEST).unlink()
    Checkpoint.open(path).verify()


@pytest.mark.parametrize("line", ["x", "0" * 64, "z" * 64 + "  a", f"{'0' * 64}  {SECOND}\n{'0' * 64}  {SECOND}"])
def test_a_manifest_that_cannot_be_read_is_refused(path: Path, line: str) -> None:
    (path / MANIFEST).write_text(line)
    refused(path, file=MANIFEST, cause="has the line")


@pytest.mark.parametrize("name", [SECOND, "config.json"])
def test_a_manifest_must_list_what_is_read(path: Path, name: str) -> None:
    lines = [line for line in (path / MANIFEST).read_text().splitlines(keepends=True) if name not in line]
    (path / MANIFEST).write_text("".join(lines))
    refused(path, file=name, cause="not listed")


@pytest.mark.parametrize("name", ["../secret", "absent.json"])
def test_a_manifest_may_only_name_files_of_the_directory(path: Path, name: str) -> None:
    with (path / MANIFEST).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match=r"plain file name|missing"):
        Checkpoint.open(path).verify()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_c15_a_weight_that_is_no_number_is_found(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    path = make_checkpoint(tmp_path, "scout", dtype=dtype)
    tensors = load_file(path / SECOND)
    tensors[NORM][63] = value
    save_file(tensors, path / SECOND)
    refused(path, file=SECOND, cause=r"element 63", tensor=NORM)


def test_c15_the_position_is_right_beyond_the_first_piece(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout", num_hidden_layers=1, vocab_size=40_000)
    tensors = load_file(path / SECOND)
    tensors["lm_head.weight"][39_999, 1] = float("nan")
    save_file(tensors, path / SECOND)
    refused(path, file=SECOND, cause=f"element {39_999 * 64 + 1}", tensor="lm_head.weight")
