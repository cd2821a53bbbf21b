import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import CheckpointError
from tests.checkpoint.shards import edit_header, safetensors_bytes, split_file
from tests.checkpoints import make_checkpoint
from tests.plain_experts import plain
from tests.presets import PRESETS

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the official reader gives it, by canonical name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_equals_what_the_official_reader_gives(tmp_path: Path, preset: str, dtype: torch.dtype) -> None:
    path = make_checkpoint(tmp_path, preset, dtype=dtype)
    checkpoint, tensors = Checkpoint.open(path), stored(path)
    assert checkpoint.entries.keys() == tensors.keys() - set(checkpoint.unused)
    for name in checkpoint.entries:
        assert checkpoint.tensor(name).dtype == dtype
        assert torch.equal(checkpoint.tensor(name), tensors[name])
    assert checkpoint.num_parameters == sum(tensors[name].numel() for name in checkpoint.entries)
    assert checkpoint.total_bytes == checkpoint.num_parameters * dtype.itemsize


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 96), (0, 40), (40, 96), (31, 33)])
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_an_experts_slice_is_that_part_of_its_width(tmp_path: Path, layout: str, start: int, stop: int | None) -> None:
    gate_up_ED2F, down_EFD = fused_experts(tmp_path / "fused")
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / layout, "scout", layout=layout))
    for expert in (0, 7, 15):
        weights = plain(checkpoint.expert(1, expert, start, stop))
        gate_DF, up_DF = gate_up_ED2F[expert].chunk(2, dim=-1)
        assert torch.equal(weights.gate_DF, gate_DF[:, start:stop])
        assert torch.equal(weights.up_DF, up_DF[:, start:stop])
        assert torch.equal(weights.down_FD, down_EFD[expert][start:stop])
        assert (weights.gate_up_D2F is not None) == (layout == "fused" and weights.gate_DF.shape[1] == 96)
        if weights.gate_up_D2F is not None:
            assert torch.equal(weights.gate_up_D2F, gate_up_ED2F[expert])


def fused_experts(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = stored(make_checkpoint(path, "scout"))
    prefix = "model.layers.1.feed_forward.experts."
    return tensors[f"{prefix}gate_up_proj"], tensors[f"{prefix}down_proj"]


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_views_share_one_mapping_and_outlive_close(tmp_path: Path, layout: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout", layout=layout))
    views = [plain(checkpoint.expert(0, 3)).down_FD, plain(checkpoint.expert(0, 3, 8, 16)).down_FD]
    assert views[0][8:16].data_ptr() == views[1].data_ptr()
    expected = views[0].clone()
    checkpoint.close()
    del checkpoint
    assert torch.equal(views[0], expected)


def test_handed_out_bytes_are_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout"))
    assert checkpoint.bytes_mapped == 0
    checkpoint.tensor(NORM)
    checkpoint.expert(0, 0, 10, 20)
    assert checkpoint.bytes_mapped == 64 * 4 + 3 * 64 * 10 * 4


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "dense"))
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight"))


@pytest.mark.parametrize("preset", ["scout", "topk2"])
def test_tensors_at_unaligned_offsets_are_copied_whole(tmp_path: Path, preset: str) -> None:
    """The format allows a header of any length, so a float32 may start at an odd byte."""
    path = make_checkpoint(tmp_path, preset)
    expected = {name: tensor.clone() for name, tensor in stored(path).items()}
    for file in (FIRST, SECOND):
        header, data = split_file(path / file)
        raw = safetensors_bytes(header)[8:]
        padded = raw + b" " * ((-len(raw)) % 8 + 1)
        (path / file).write_bytes(safetensors_bytes(padded, data))
    checkpoint = Checkpoint.open(path)
    assert all(entry.start % 4 for entry in checkpoint.entries.values())
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    gate_up = expected["model.layers.1.feed_forward.experts.gate_up_proj"]
    weights = plain(checkpoint.expert(1, 2, 5, 9))
    assert weights.up_DF.data_ptr() % 4 == 0
    assert torch.equal(weights.up_DF, gate_up[2][:, 96 + 5 : 96 + 9])


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.tensor("model.norm"),
        lambda c: c.tensor("vision_model.class_embedding"),
        lambda c: c.expert(0, 0),  # maverick's layer 0 is dense
        lambda c: c.expert(1, 32),
        lambda c: c.expert(1, -1),
        lambda c: c.expert(1, 0, 5, 5),
        lambda c: c.expert(1, 0, 0, 97),
    ],
)
def test_asking_for_what_the_geometry_has_not_is_a_value_error(tmp_path: Path, call: Any) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "maverick"))
    with pytest.raises(ValueError, match=r"no |does not lie"):
        call(checkpoint)


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("preset", PRESETS)
def test_c01_any_missing_tensor_is_named(tmp_path: Path, preset: str, layout: str) -> None:
    path = make_checkpoint(tmp_path, preset, layout=layout, num_shards=1)
    header, data = split_file(path / "model.safetensors")
    names = [name for name in header if name != "__metadata__" and not name.startswith(("vision", "multi"))]
    for name in names[:: max(1, len(names) // 12)]:
        renamed = {("renamed" if key == name else key): fields for key, fields in header.items()}
        (path / "model.safetensors").write_bytes(safetensors_bytes(renamed, data))
        with pytest.raises(CheckpointError, match="missing") as caught:
            Checkpoint.open(path)
        assert caught.value.file == "model.safetensors"
        # Without its first fused tensor a checkpoint reads as per-expert, and the first of those is what is missing.
        assert caught.value.tensor.split(".experts")[0] == name.split(".experts")[0]


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_c11_another_dtype_than_the_configs_is_refused(tmp_path: Path, dtype: str) -> None:
    path = make_checkpoint(tmp_path, "scout")
    edit_header(path / SECOND, lambda header: header[NORM].update(dtype=dtype))
    with pytest.raises(CheckpointError, match=f"is {dtype}; .* F32") as caught:
        Checkpoint.open(path)
    assert (caught.value.file, caught.value.tensor) == (SECOND, NORM)


@pytest.mark.parametrize("preset", ["scout", "conditional"])
def test_c12_another_shape_than_the_configs_is_refused(tmp_path: Path, preset: str) -> None:
    path = make_checkpoint(tmp_path, preset)
    name = ("language_model." if preset == "conditional" else "") + "model.layers.0.self_attn.k_proj.weight"
    edit_header(path / FIRST, lambda header: header[name].update(shape=[64, 32]))
    with pytest.raises(CheckpointError, match=r"has shape \[64, 32\]; .*\[32, 64\]") as caught:
        Checkpoint.open(path)
    assert (caught.value.file, caught.value.tensor) == (FIRST, name)


@pytest.mark.parametrize("change", ["grow", "shrink", "replace", "rewrite"])
def test_c19_a_shard_that_changed_since_open_is_refused(tmp_path: Path, change: str) -> None:
    path = make_checkpoint(tmp_path, "scout")
    shard = path / SECOND
    checkpoint = Checkpoint.open(path)
    if change == "replace":
        (path / "new").write_bytes(shard.read_bytes())
        os.replace(path / "new", shard)
    elif change == "rewrite":
        os.utime(shard, ns=(0, 0))
    else:
        os.truncate(shard, shard.stat().st_size + (1 if change == "grow" else -1))
    with pytest.raises(CheckpointError, match="changed after") as caught:
        checkpoint.tensor(NORM)
    assert caught.value.file == SECOND


def test_c24_the_hash_tells_checkpoints_apart_and_equal_ones_together(tmp_path: Path) -> None:
    def hash_of(name: str, preset: str = "scout", **changes: Any) -> str:
        return Checkpoint.open(make_checkpoint(tmp_path / name, preset, **changes)).model_hash

    reference = hash_of("reference")
    assert len(reference) == 64
    assert hash_of("copy") == reference
    others = [
        hash_of("layout", layout="per_expert"),
        hash_of("dtype", dtype=torch.bfloat16),
        hash_of("shards", num_shards=3),
        hash_of("scale", attn_scale=0.2),
        hash_of("geometry", intermediate_size=64),
        hash_of("nested", "conditional"),
    ]
    assert len({reference, *others}) == 1 + len(others)


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout", num_shards=4))
    sums: list[float] = []

    def read_all() -> None:
        sums.append(sum(float(checkpoint.tensor(name).sum(dtype=torch.float64)) for name in checkpoint.entries))

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sums) == 4
    assert len(set(sums)) == 1
    assert checkpoint.bytes_mapped == 4 * checkpoint.total_bytes
