"""Writes the model folder: bf16 weights in two shards, config and tokenizer; knows nothing of training."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tools.train_bundled_model.model import Geometry, MiniLlama4
from tools.train_bundled_model.tokenizer import SPECIAL_TOKENS, special_id

MAX_POSITIONS = 1024


def write(model: MiniLlama4, tokens: Tokenizer, folder: Path) -> None:
    """Write everything beside its place first, then move it in, so that a reader never meets half a file."""
    staged = folder.with_name(f".{folder.name}.part")
    for path in (staged, folder):
        path.mkdir(parents=True, exist_ok=True)
    write_json(staged / "config.json", config_of(model.g, tokens))
    write_json(staged / "generation_config.json", generation_config_of(tokens))
    write_json(staged / "tokenizer_config.json", tokenizer_config())
    tokens.save(str(staged / "tokenizer.json"))
    write_weights(model, staged)
    for path in sorted(staged.iterdir()):
        os.replace(path, folder / path.name)
    staged.rmdir()


def write_weights(model: MiniLlama4, folder: Path) -> None:
    """Split the tensors in two shards at the middle layer."""
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    middle = len(model.g.rope_layers) // 2
    first = {"model.embed_tokens.weight"} | {n for n in tensors if ".layers." in n and int(n.split(".")[2]) < middle}
    shards = {
        "model-00001-of-00002.safetensors": {n: t for n, t in tensors.items() if n in first},
        "model-00002-of-00002.safetensors": {n: t for n, t in tensors.items() if n not in first},
    }
    for file, shard in shards.items():
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors creates its files readable by the owner alone
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    places = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def config_of(g: Geometry, tokens: Tokenizer) -> dict[str, object]:
    """Return config.json with every key an engine reads, nothing left to a default."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_size": g.dim,
        "num_hidden_layers": len(g.rope_layers),
        "num_attention_heads": g.num_heads,
        "num_key_value_heads": g.num_kv_heads,
        "head_dim": g.head_dim,
        "intermediate_size": g.expert_dim,
        "intermediate_size_mlp": 2 * g.expert_dim,
        "num_local_experts": g.num_experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "moe_layers": list(range(len(g.rope_layers))),
        "no_rope_layers": list(g.rope_layers),
        "layer_types": ["chunked_attention" if rope else "full_attention" for rope in g.rope_layers],
        "attention_chunk_size": g.chunk,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": True,
        "rope_theta": g.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": g.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.01,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "for_llm_compressor": False,
        "tie_word_embeddings": False,
        "vocab_size": g.vocab_size,
        **special_ids(tokens),
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def generation_config_of(tokens: Tokenizer) -> dict[str, object]:
    return {**special_ids(tokens), "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def special_ids(tokens: Tokenizer) -> dict[str, object]:
    return {
        "bos_token_id": special_id(tokens, "<|begin_of_text|>"),
        "eos_token_id": [special_id(tokens, t) for t in ("<|end_of_text|>", "<|eom|>", "<|eot|>")],
        "pad_token_id": special_id(tokens, "<|finetune_right_pad|>"),
    }


def tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in ("<|begin_of_text|>", "<|eot|>")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
