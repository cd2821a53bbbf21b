"""What a mapped checkpoint costs in memory and time, counted by the kernel; the files are sparse and store nothing."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.config_file import parse_config
from llama4_dist.checkpoint.index import INDEX
from llama4_dist.checkpoint.names import expected_tensors, stored_prefix
from llama4_dist.checkpoint.reader import Checkpoint
from tests.checkpoint.published import BEHEMOTH, TEXT
from tests.plain_experts import plain

MIB = 1024 * 1024
# Around what is touched, the kernel also maps what its read-ahead fetched: at most one huge page at either end.
READ_AHEAD = 2 * MIB
WIDE = TEXT | {  # experts of 96 MiB whose rows are far wider than a page: 4 MiB of gate and up
    "architectures": ["Llama4ForCausalLM"],
    "torch_dtype": "float32",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 524288,
    "intermediate_size_mlp": 16,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "max_position_embeddings": 1024,
}
WIDE_EXPERT = 96 * MIB


def write_sparse(path: Path, content: dict[str, Any], num_shards: int) -> None:
    """Write a checkpoint of zeros whose data sections are holes of the file system."""
    raw = json.dumps(content)
    (path / "config.json").write_text(raw)
    config = parse_config(raw.encode())
    item_bytes, dtype = (2, "BF16") if config.dtype == "bfloat16" else (4, "F32")
    shapes = {stored_prefix(config) + name: shape for name, shape in expected_tensors(config).items()}
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file = f"model-{number}.safetensors"
        header, position = {}, 0
        for name in list(shapes)[number::num_shards]:
            stop = position + math.prod(shapes[name]) * item_bytes
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [position, stop]}
            weight_map[name], position = file, stop
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (path / file).open("wb") as shard:
            shard.write(len(encoded).to_bytes(8, "little") + encoded)
            shard.truncate(8 + len(encoded) + position)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def resident_bytes(path: Path) -> int:
    """Bytes of the files under `path` that are mapped into this process and in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(path) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def wide(tmp_path: Path) -> Checkpoint:
    write_sparse(tmp_path, WIDE, num_shards=1)
    return Checkpoint.open(tmp_path)


def touch(*tensors: torch.Tensor) -> None:
    assert all(float(tensor.sum()) == 0.0 for tensor in tensors)


def test_opening_and_handing_out_views_reads_no_weight(wide: Checkpoint) -> None:
    experts = [wide.expert(0, expert) for expert in range(4)]
    assert wide.bytes_mapped == len(experts) * WIDE_EXPERT
    assert resident_bytes(wide.path) == 0


def test_one_expert_brings_in_one_experts_bytes(wide: Checkpoint) -> None:
    weights = plain(wide.expert(0, 2))
    touch(weights.gate_DF, weights.up_DF, weights.down_FD)
    assert WIDE_EXPERT <= resident_bytes(wide.path) <= WIDE_EXPERT + 2 * 2 * READ_AHEAD


def test_a_slice_of_an_expert_brings_in_that_slices_bytes(wide: Checkpoint) -> None:
    """An eighth of the width: 256 KiB of each row of 4 MiB, twice for each of 16 rows, and 4 MiB of down."""
    weights = plain(wide.expert(0, 1, 65536, 131072))
    touch(weights.gate_DF, weights.up_DF, weights.down_FD)
    # 33 separate ranges, each with its read-ahead: still nowhere near the expert, let alone the layer.
    assert WIDE_EXPERT // 8 <= resident_bytes(wide.path) < WIDE_EXPERT // 3


def test_a_checkpoint_of_four_terabytes_opens_in_two_seconds(tmp_path: Path) -> None:
    write_sparse(tmp_path, BEHEMOTH, num_shards=8)
    start = time.monotonic()
    checkpoint = Checkpoint.open(tmp_path)
    weights = plain(checkpoint.expert(95, 15, 24064 // 2, 24064))
    last_row = weights.down_FD[-1].clone()
    seconds = time.monotonic() - start
    assert checkpoint.total_bytes > 3.9e12
    assert last_row.shape == (16384,)
    assert resident_bytes(tmp_path) <= READ_AHEAD
    assert seconds < 2.0


def test_reading_ahead_brings_a_slice_into_the_page_cache_and_releasing_it_takes_it_out_of_the_process(
    wide: Checkpoint,
) -> None:
    wide.read_ahead_expert(0, 3, 0, 65536)
    weights = plain(wide.expert(0, 3, 0, 65536))
    touch(weights.gate_DF, weights.down_FD)
    assert resident_bytes(wide.path) >= WIDE_EXPERT // 12
    wide.release_expert(0, 3, 0, 65536)
    assert resident_bytes(wide.path) <= 6 * READ_AHEAD  # what the kernel mapped beside it
    wide.release_expert(0, 3, 0, 65536, around=READ_AHEAD)
    assert resident_bytes(wide.path) == 0
    touch(weights.up_DF)  # views read the file again
