"""Convert a checkpoint to the GGUF file that llama.cpp's llama4 architecture reads, float32 or bfloat16.

llama.cpp knows chunk size, temperature and its floor by heart (8192, 0.1, 8192) and takes every fourth layer for one
without rotation; a checkpoint that differs is refused, because the file would be another model. Rotation is of adjacent
pairs on both sides, so no weight is permuted. The vocabulary is left out ("none"): prompts are token ids.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.model.rope import frequencies
from tests.plain_experts import plain

BUILT_IN = {"chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
EXPERTS_OF_128 = 128  # with that many, llama.cpp leaves the QK-norm out, as Maverick does
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(model_dir: Path, path: Path) -> None:
    """Write the checkpoint in `model_dir` to the GGUF file `path`, in its own dtype."""
    checkpoint = Checkpoint.open(model_dir)
    if checkpoint.scheme is not None:
        raise ValueError(f"the checkpoint is quantised ({checkpoint.scheme.title}): convert the one it was made of")
    refuse_others(checkpoint.config)
    writer = gguf.GGUFWriter(path, "llama4")
    write_metadata(writer, checkpoint.config)
    for name, tensor in tensors(checkpoint):
        write_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint.close()


def refuse_others(config: ModelConfig) -> None:
    """Raise ValueError where llama.cpp would compute another model than `config` says."""
    wrong = [
        f"{name}={getattr(config, name)} (built in: {built_in})"
        for name, built_in in BUILT_IN.items()
        if getattr(config, name) != built_in
    ]
    every_fourth = tuple((layer + 1) % 4 != 0 for layer in range(config.num_layers))
    if config.rope_layers != every_fourth or config.chunked_layers != every_fourth:
        wrong.append("layers without rotation are not every fourth one")
    if config.use_qk_norm != (config.num_experts != EXPERTS_OF_128):
        wrong.append(f"use_qk_norm={config.use_qk_norm} with {config.num_experts} experts")
    if not config.temperature_tuning:
        wrong.append("no temperature tuning")
    if not config.moe_layer_ids or config.moe_layers != interleaved(config):
        wrong.append("MoE layers are not every n-th one")
    if config.tie_word_embeddings:
        wrong.append("the head is tied")
    if wrong:
        raise ValueError(f"llama.cpp's llama4 has other constants: {'; '.join(wrong)}")


def moe_step(config: ModelConfig) -> int:
    """Return n where every n-th layer, counted from one, has experts."""
    return config.moe_layer_ids[0] + 1


def interleaved(config: ModelConfig) -> tuple[bool, ...]:
    return tuple((layer + 1) % moe_step(config) == 0 for layer in range(config.num_layers))


def write_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_name("random llama4")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.dense_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_feed_forward_length(config.expert_width)
    writer.add_interleave_moe_layer_step(moe_step(config))
    writer.add_tokenizer_model("none")


def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's name of each tensor, and the tensor in [out, in] order, experts stacked."""
    config = checkpoint.config
    for name, gguf_name in TOP_NAMES.items():
        yield f"{gguf_name}.weight", checkpoint.tensor(f"{name}.weight")
    if config.rope_scaling is not None:
        scaled = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield "rope_freqs.weight", frequencies(config.head_dim, config.rope_theta, None) / scaled
    for layer in range(config.num_layers):
        for name, gguf_name in LAYER_NAMES.items():
            full_name = f"model.layers.{layer}.{name}.weight"
            if full_name in checkpoint.entries:
                yield f"blk.{layer}.{gguf_name}.weight", checkpoint.tensor(full_name)
        if config.moe_layers[layer]:
            experts = [plain(checkpoint.expert(layer, expert)) for expert in range(config.num_experts)]
            yield f"blk.{layer}.ffn_gate_exps.weight", torch.stack([expert.gate_DF.T for expert in experts])
            yield f"blk.{layer}.ffn_up_exps.weight", torch.stack([expert.up_DF.T for expert in experts])
            yield f"blk.{layer}.ffn_down_exps.weight", torch.stack([expert.down_FD.T for expert in experts])


def write_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Add a tensor; norms and routers are float32 in every file, as llama.cpp's own converter writes them."""
    if tensor.dtype != torch.bfloat16 or tensor.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
        return
    words = tensor.contiguous().view(torch.uint16).numpy()
    writer.add_tensor(name, words.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("gguf", type=Path, help="file to write")
    arguments = parser.parse_args()
    convert(arguments.model, arguments.gguf)


if __name__ == "__main__":
    main()
