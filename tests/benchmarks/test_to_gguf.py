"""A converted checkpoint, read back with the format's own reader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.plain_experts import plain

gguf = pytest.importorskip("gguf")

from benchmarks.to_gguf import convert  # noqa: E402 - needs gguf

PUBLISHED: dict[str, Any] = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
D, E, F, C = 64, 16, 96, 16


def converted(tmp_path: Path, preset: str, **options: Any) -> tuple[Checkpoint, Any]:
    model_dir = make_checkpoint(tmp_path / "model", preset, **(PUBLISHED | options))
    convert(model_dir, tmp_path / "model.gguf")
    return Checkpoint.open(model_dir), gguf.GGUFReader(tmp_path / "model.gguf")


def values(tensor: Any) -> Tensor:
    """The values in [out, in] order; GGUF names the innermost dimension first."""
    shape = [int(size) for size in reversed(tensor.shape)]
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(tensor.data.view(np.uint16).copy()).view(torch.bfloat16).reshape(shape)
    return torch.from_numpy(tensor.data.copy()).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_there_under_its_name(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint, reader = converted(tmp_path, "scout", dtype=dtype)
    found = {tensor.name: values(tensor) for tensor in reader.tensors}
    layer = "model.layers.3."
    same = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.3.attn_norm.weight": f"{layer}input_layernorm.weight",
        "blk.3.ffn_norm.weight": f"{layer}post_attention_layernorm.weight",
        "blk.3.attn_q.weight": f"{layer}self_attn.q_proj.weight",
        "blk.3.attn_k.weight": f"{layer}self_attn.k_proj.weight",
        "blk.3.attn_v.weight": f"{layer}self_attn.v_proj.weight",
        "blk.3.attn_output.weight": f"{layer}self_attn.o_proj.weight",
        "blk.3.ffn_gate_inp.weight": f"{layer}feed_forward.router.weight",
        "blk.3.ffn_gate_shexp.weight": f"{layer}feed_forward.shared_expert.gate_proj.weight",
        "blk.3.ffn_up_shexp.weight": f"{layer}feed_forward.shared_expert.up_proj.weight",
        "blk.3.ffn_down_shexp.weight": f"{layer}feed_forward.shared_expert.down_proj.weight",
    }
    for gguf_name, name in same.items():
        assert torch.equal(found[gguf_name].float(), checkpoint.tensor(name).float()), gguf_name
    stacked = {"gate_exps": (E, F, D), "up_exps": (E, F, D), "down_exps": (E, D, F)}
    assert {name: tuple(found[f"blk.0.ffn_{name}.weight"].shape) for name in stacked} == stacked
    last = plain(checkpoint.expert(3, E - 1))
    assert torch.equal(found["blk.3.ffn_gate_exps.weight"][E - 1], last.gate_DF.T)
    assert torch.equal(found["blk.3.ffn_up_exps.weight"][E - 1], last.up_DF.T)
    assert torch.equal(found["blk.3.ffn_down_exps.weight"][E - 1], last.down_FD.T)
    assert len(found) == 3 + 1 + 4 * 13  # the top, rotation factors, layers
    # Nothing is converted on the way but what llama.cpp wants in float32.
    assert found["blk.0.attn_q.weight"].dtype == dtype
    assert found["blk.0.attn_norm.weight"].dtype == found["blk.0.ffn_gate_inp.weight"].dtype == torch.float32


def test_stretched_wavelengths_are_said_as_factors(tmp_path: Path) -> None:
    _, reader = converted(tmp_path, "scout")
    factors = next(values(tensor) for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    # Scaling is 16 for wavelengths beyond the original context of 64 positions, 1 for the others.
    wavelengths = 2 * torch.pi * 500000.0 ** (torch.arange(0, C, 2) / C)
    assert torch.allclose(factors, torch.where(wavelengths > 64, 16.0, 1.0))


def test_metadata_say_the_geometry(tmp_path: Path) -> None:
    _, reader = converted(tmp_path, "scout")
    keys = {
        "llama4.block_count": 4,
        "llama4.embedding_length": D,
        "llama4.feed_forward_length": 160,
        "llama4.expert_feed_forward_length": F,
        "llama4.expert_count": E,
        "llama4.expert_used_count": 1,
        "llama4.interleave_moe_layer_step": 1,
        "llama4.attention.head_count": 4,
        "llama4.attention.head_count_kv": 2,
        "llama4.attention.key_length": C,
        "llama4.rope.dimension_count": C,
        "llama4.rope.freq_base": 500000.0,
        "llama4.vocab_size": 320,
        "tokenizer.ggml.model": "none",
        "general.architecture": "llama4",
    }
    assert {key: reader.fields[key].contents() for key in keys} == keys


@pytest.mark.parametrize(
    ("preset", "options", "named"),
    [
        ("scout", {"attention_chunk_size": 16}, "chunk_size=16"),
        ("scout", {"attn_scale": 0.5}, "attn_scale=0.5"),
        ("scout", {"use_qk_norm": False}, "use_qk_norm=False with 16 experts"),
        ("scout", {"attn_temperature_tuning": False}, "no temperature tuning"),
        ("topk2", {}, "every fourth"),
        ("dense", {}, "MoE layers are not every n-th one"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, preset: str, options: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        converted(tmp_path, preset, **options)


def test_dense_layers_have_names_of_their_own(tmp_path: Path) -> None:
    checkpoint, reader = converted(tmp_path, "maverick", num_local_experts=128, intermediate_size=16)
    found = {tensor.name: values(tensor) for tensor in reader.tensors}
    for name in ("gate", "up", "down"):
        expected = checkpoint.tensor(f"model.layers.2.feed_forward.{name}_proj.weight")
        assert torch.equal(found[f"blk.2.ffn_{name}.weight"], expected)
        assert f"blk.2.ffn_{name}_exps.weight" not in found
    assert reader.fields["llama4.interleave_moe_layer_step"].contents() == 2
