"""The quantiser: it writes compressed-tensors' own bytes, and whatever ends a run, the next one goes on."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4_dist.checkpoint.directory import open_file
from llama4_dist.checkpoint.header import read_header
from llama4_dist.checkpoint.quantising import files, run
from llama4_dist.checkpoint.quantising.journal import PARTIAL_JOURNAL, REPORT
from llama4_dist.checkpoint.quantising.plan import Targets
from llama4_dist.checkpoint.quantising.run import Result, quantise_checkpoint
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import Number, Scheme
from llama4_dist.errors import CheckpointError, ConfigError, ConflictError, PreconditionError
from tests.checkpoints import make_checkpoint
from tests.model.quantised_experts import quantised_expert
from tests.plain_experts import plain
from tests.quantised_checkpoints import compress, make_quantised, scheme_of, stored_tensors

SCHEMES = {
    "fp8": Scheme(number=Number.FLOAT8),
    "int8": Scheme(number=Number.INT8, is_packed=True),
    "int8-groups": Scheme(number=Number.INT8, group_size=32, is_packed=True),
    "int4": Scheme(number=Number.INT4, group_size=32, is_packed=True),
    "int8-plain": Scheme(number=Number.INT8),
}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", "scout", num_shards=3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def quantise(source: Path, out: Path, form: str = "fp8") -> Result:
    return quantise_checkpoint(source, out, SCHEMES[form])


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("form", SCHEMES)
def test_every_tensor_is_that_of_compressed_tensors(form: str, layout: str, tmp_path: Path, out: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "scout", layout=layout)
    expected = stored_tensors(make_quantised(tmp_path / "theirs", form))
    result = quantise(source, out, form)
    found = stored_tensors(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert len(result.errors) == 4 * 16 * 3
    Checkpoint.open(out).verify()


@pytest.mark.parametrize("preset", ["maverick", "conditional", "topk2"])
def test_what_is_not_a_target_stays_byte_by_byte(preset: str, tmp_path: Path, out: Path) -> None:
    source = make_checkpoint(tmp_path / "source", preset, num_shards=1, dtype=torch.bfloat16)
    quantise(source, out)
    before, after = stored_tensors(source), stored_tensors(out)
    kept = {name for name in before if ".experts." not in name}
    assert kept == {name for name in after if ".experts." not in name}
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in kept)
    assert not (out / "model.safetensors.index.json").exists()
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"{name}.weight" for name in ignored} == {
        name for name in kept if name.endswith(".weight") and before[name].ndim == 2 and "embed_tokens" not in name
    }


def test_all_linears_may_be_targets(source: Path, out: Path) -> None:
    result = quantise_checkpoint(source, out, SCHEMES["int4"], targets=Targets.LINEARS)
    assert len(result.errors) == 4 * (16 * 3 + 3 + 4)
    checkpoint, plain = Checkpoint.open(out), Checkpoint.open(source)
    name = "model.layers.0.self_attn.o_proj.weight"
    scheme, form = scheme_of("int4")
    theirs = compress(plain.tensor(name), scheme, form, lambda scale: scale)
    assert torch.equal(stored_tensors(out)[f"{name}_packed"], theirs["weight_packed"])
    assert 0 < (checkpoint.tensor(name) - plain.tensor(name)).abs().max() < 0.1


def test_errors_are_those_of_the_weights_as_they_are_read(source: Path, out: Path) -> None:
    result = quantise(source, out, "int4")
    name = "model.layers.2.feed_forward.experts.7.up_proj.weight"
    (error,) = [error for error in result.errors if error.name == name]
    weight_FD = plain(Checkpoint.open(source).expert(2, 7)).up_DF.T.double()
    lost_FD = quantised_expert(out, 2, 7).up_FD.dequantise(torch.float64) - weight_FD
    relative = float(lost_FD.norm() / weight_FD.norm())
    assert error.largest == pytest.approx(float(lost_FD.abs().max()), rel=1e-5)
    assert error.relative == pytest.approx(relative, rel=1e-5)
    assert error.sqnr_db == pytest.approx(float(-20 * torch.tensor(relative).log10()), rel=1e-5)
    written = json.loads((out / REPORT).read_text())["journal"]["shards"]
    assert sum(len(shard["errors"]) for shard in written.values()) == len(result.errors)


def test_an_output_of_zeros_is_exact_and_has_a_scale(tmp_path: Path, out: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "scout", layout="per_expert", num_shards=1)
    name = "model.layers.0.feed_forward.experts.0.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = quantise(source, out, "fp8")
    (error,) = [error for error in result.errors if error.name == name]
    assert (error.largest, error.relative, error.sqnr_db) == (0, 0, None)
    assert not quantised_expert(out, 0, 0).up_FD.dequantise().any()


def test_tensors_lie_at_multiples_of_their_own_size(source: Path, out: Path) -> None:
    quantise(source, out, "int8-plain")
    for path in out.glob("*.safetensors"):
        with open_file(out, path.name) as file:
            for entry in read_header(file, path.name).values():
                assert entry.start % {"I8": 1, "F32": 4, "BF16": 2}[entry.dtype] == 0


def test_other_files_come_along_and_nothing_else(source: Path, out: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "consolidated.00.pth").write_bytes(b"\x80\x02")
    (source / "manifest.sha256").write_text("of the source")
    quantise(source, out)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "manifest.sha256", REPORT),
        *("model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))),
    }


def test_a_second_run_of_the_same_finds_everything_done(source: Path, out: Path) -> None:
    quantise(source, out)
    before = contents(out)
    result = quantise(source, out)
    assert result.kept == result.shards
    assert contents(out) == before


class Stopped(BaseException):
    """As a signal would: nobody catches it."""


def stop_after(shards: int, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    """Let the run break in the middle of the shard after so many."""
    count = 0
    original = files.write_at

    def write_at(descriptor: int, content: bytes, position: int) -> None:
        nonlocal count
        count += position == 0 and os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors.partial")
        if count > shards and position > 0:
            raise error()
        original(descriptor, content, position)

    monkeypatch.setattr(run, "write_at", write_at)


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    num_done: int, source: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantise(source, tmp_path / "whole") and contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(num_done, patch, Stopped)
        with pytest.raises(Stopped):
            quantise(source, out)
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError):
        Checkpoint.open(out)
    result = quantise(source, out)
    assert len(result.kept) == num_done
    assert contents(out) == expected


def test_a_full_disk_is_said_and_the_next_run_goes_on(
    source: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantise(source, tmp_path / "whole") and contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(1, patch, lambda: OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(PreconditionError, match=r"no room in .* are free; make") as caught:
            quantise(source, out)
    assert caught.value.reason == "DISK_FULL"
    assert {path.name for path in out.iterdir()} == {PARTIAL_JOURNAL, "model-00001-of-00003.safetensors"}
    assert len(quantise(source, out).kept) == 1
    assert contents(out) == expected


def test_room_is_taken_before_anything_is_computed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, num_bytes: int) -> None:
        if num_bytes > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(run, "quantise_linear", lambda *given: pytest.fail("computed for nothing"))
    with pytest.raises(PreconditionError, match=r"model-00001-of-00003.safetensors: no room"):
        quantise(source, out)


def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(
    source: Path, tmp_path: Path, out: Path
) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from llama4_dist.checkpoint.quantising import run\n"
        "from llama4_dist.checkpoint.scheme import Number, Scheme\n"
        "def kill(done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "run.quantise_checkpoint(source, out, Scheme(number=Number.FLOAT8), progress=kill)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code, source, out], env=environment, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert any(path.name.endswith(".partial") for path in out.iterdir())
    result = quantise(source, out)
    assert 0 < len(result.kept) < 3
    quantise(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_finished_shard_that_was_damaged_is_made_again(damage: str, source: Path, out: Path) -> None:
    quantise(source, out)
    expected = contents(out)
    shard = out / "model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    match damage:
        case "cut":
            shard.write_bytes(raw[:-100])
        case "flipped":
            shard.write_bytes(raw)
        case _:
            shard.unlink()
    assert len(quantise(source, out).kept) == 2
    assert contents(out) == expected


def test_a_changed_source_is_not_mixed_with_what_was_made_of_the_old_one(source: Path, out: Path) -> None:
    quantise(source, out)
    shard = source / "model-00003-of-00003.safetensors"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    with pytest.raises(ConflictError, match="was begun with another source: files was"):
        quantise(source, out)


def test_other_options_are_not_mixed_either(source: Path, out: Path) -> None:
    quantise(source, out)
    with pytest.raises(ConflictError, match=r"was begun with other options: scheme was .*float8.* is .*int4"):
        quantise(source, out, "int4")
    with pytest.raises(ConflictError, match="targets was experts, is linears"):
        quantise_checkpoint(source, out, SCHEMES["fp8"], targets=Targets.LINEARS)


def test_a_journal_that_was_edited_is_not_believed(source: Path, out: Path) -> None:
    quantise(source, out)
    (out / REPORT).write_text((out / REPORT).read_text().replace('"num_bytes": ', '"num_bytes": 1', 1))
    with pytest.raises(CheckpointError, match="is no journal of a quantisation, or was changed"):
        quantise(source, out)


def test_a_folder_that_holds_something_else_is_left_alone(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConflictError, match="is not empty: choose a new folder"):
        quantise(source, out)
    with pytest.raises(ConfigError, match="cannot be written over its source"):
        quantise(source, source)
    with pytest.raises(ConfigError, match="cannot be made or opened"):
        quantise(source, out / "notes.txt")
    assert contents(out) == {"notes.txt": b"mine"}


def test_two_runs_do_not_write_to_one_folder(source: Path, out: Path) -> None:
    out.mkdir()
    holder = os.open(out, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(ConflictError, match="another run writes to"):
        quantise(source, out)
    os.close(holder)
    quantise(source, out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(value: float, source: Path, out: Path) -> None:
    name = "model.layers.3.feed_forward.experts.down_proj"
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][4, 3, 2] = value
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.down_proj' holds NaN or an infinity") as caught:
        quantise(source, out)
    assert caught.value.tensor == name
    assert not (out / "config.json").exists()


def test_what_cannot_be_quantised_so_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, out: Path
) -> None:
    odd = Scheme(number=Number.INT4, group_size=40, is_packed=True)
    with pytest.raises(ConfigError, match=r"tensor .* inputs do not divide into groups of 40: choose a group size"):
        quantise_checkpoint(source, out, odd)
    with pytest.raises(ConfigError, match="is quantised already"):
        quantise(make_quantised(tmp_path / "q", "fp8"), out)
    with pytest.raises(ConfigError, match="has no linears that targets='experts' names"):
        quantise(make_checkpoint(tmp_path / "dense", "dense"), out)
    assert not out.exists()


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, out: Path) -> None:
    """More than a linear at a time, but far less than a shard: what a process holds beside the mapped file."""
    shape: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_local_experts": 64,
    }
    source = make_checkpoint(tmp_path / "source", "scout", num_shards=1, dtype=torch.bfloat16, **shape)
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from llama4_dist.checkpoint.quantising.run import quantise_checkpoint\n"
        "from llama4_dist.checkpoint.scheme import Number, Scheme\n"
        "from tests.checkpoints import make_checkpoint\n"
        "small, source, out = map(Path, sys.argv[1:])\n"
        "scheme = Scheme(number=Number.FLOAT8)\n"
        "def heap():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1])\n"
        "quantise_checkpoint(small, out / 'small', scheme)\n"
        "before, most = heap(), 0\n"
        "def watch(done, total):\n"
        "    global most\n"
        "    most = max(most, heap())\n"
        "quantise_checkpoint(source, out / 'large', scheme, progress=watch)\n"
        "print(most - before)\n"
    )
    small = make_checkpoint(tmp_path / "small", "scout")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out.mkdir()
    command: list[str | Path] = [sys.executable, "-c", code, small, source, out]
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    weights_kb = 64 * 3 * 512 * 512 * 2 // 1024
    assert int(shown.stdout) < weights_kb / 4
    shutil.rmtree(out)
