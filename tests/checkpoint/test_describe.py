import math
from pathlib import Path

import torch

from llama4_dist.checkpoint.describe import describe
from llama4_dist.checkpoint.reader import Checkpoint
from tests.checkpoints import make_checkpoint, vision_shapes
from tests.presets import BASE


def test_a_summary_counts_what_the_geometry_says(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "maverick", dtype=torch.bfloat16, num_hidden_layers=8, num_shards=3)
    summary = describe(Checkpoint.open(path))
    attention = 2 * 64 * 128 + 2 * 64 * 32 + 2 * 64
    moe, dense, expert = 64 * 32, 3 * 64 * 160, 3 * 64 * 96
    shared = 2 * 320 * 64 + 64 + 8 * attention + 4 * (moe + expert) + 4 * dense
    assert summary.num_parameters == shared + 4 * 32 * expert
    assert summary.num_active_parameters == shared + 4 * 1 * expert
    assert summary.num_bytes == 2 * summary.num_parameters
    assert (summary.num_shards, summary.dtype, summary.layout) == (3, "bfloat16", "fused")
    assert (summary.num_layers, summary.num_moe_layers, summary.num_nope_layers) == (8, 4, 2)
    assert (summary.num_chunked_layers, summary.chunk_size) == (6, 16)
    assert (summary.num_experts, summary.experts_per_token, summary.expert_bytes) == (32, 1, 2 * expert)
    assert summary.kv_bytes_per_token == 8 * 2 * 2 * 16 * 2
    assert summary.kv_bytes_per_token_beyond_chunk == 2 * 2 * 2 * 16 * 2
    assert (summary.num_unused_tensors, summary.unused_bytes) == (0, 0)


def test_a_dense_model_has_no_idle_parameters(tmp_path: Path) -> None:
    summary = describe(Checkpoint.open(make_checkpoint(tmp_path, "dense")))
    assert summary.num_active_parameters == summary.num_parameters
    assert (summary.layout, summary.expert_bytes) == ("dense", 0)


def test_vision_tensors_are_counted_apart(tmp_path: Path) -> None:
    plain = describe(Checkpoint.open(make_checkpoint(tmp_path / "plain", "scout")))
    nested = describe(Checkpoint.open(make_checkpoint(tmp_path / "nested", "conditional")))
    assert nested.num_parameters == plain.num_parameters
    vision = vision_shapes(BASE).values()
    assert nested.num_unused_tensors == len(vision)
    assert nested.unused_bytes == 4 * sum(math.prod(shape) for shape in vision)
