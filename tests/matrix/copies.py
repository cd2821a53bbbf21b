"""Copies of a checkpoint to damage, and where an expert lies in their files; shares no line with the reader."""

import json
import shutil
import struct
from pathlib import Path

Pair = tuple[int, int]


def copy_model(model_dir: Path, folder: Path) -> Path:
    """Copy a checkpoint."""
    shutil.copytree(model_dir, folder)
    return folder


def down_of(model_dir: Path, pair: Pair) -> tuple[Path, int]:
    """Return the file and the offset of the first weight of an expert's down projection."""
    layer, expert = pair
    name = f"model.layers.{layer}.feed_forward.experts.down_proj"
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    path = model_dir / index["weight_map"][name]
    header, begin = read_header(path)
    num_experts, num_in, num_out = header[name]["shape"]
    assert expert < num_experts
    return path, begin + header[name]["data_offsets"][0] + expert * num_in * num_out * 4


def read_header(path: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Return a shard's header and where its tensors begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def shards(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))
