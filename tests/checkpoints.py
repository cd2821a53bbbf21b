"""Writes tiny random checkpoints in the published Hugging Face layout; shares no line with the reader it tests.

Weights have a standard deviation of about 1/sqrt(fan in), so that every feature (chunks, NoPE, temperature, qk-norm,
routing) moves the logits far above rounding noise. A tensor's values depend on (seed, name) alone: the same preset and
seed hold the same numbers in either layout and in any number of shards.

The values are those of no published model; only the keys, names and layouts are.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.presets import BASE, NUM_RANKS, PRESETS, VISION

# Twice the usual size, so that attention and routing have clear winners and tuning them shows.
_STRONG = ("q_proj.weight", "router.weight", "lm_head.weight", "embed_tokens.weight")


def make_checkpoint(
    path: Path | str,
    preset: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: str = "fused",
    num_shards: int = 2,
    **overrides: Any,
) -> Path:
    """Write config.json, generation_config.json and the shards of `preset` into `path`; return `path`.

    `layout` is "fused" (one [E, D, 2F] tensor per layer, as published) or "per_expert" (one linear per expert, as
    re-quantised exports store it). `overrides` replace keys of the text config.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    text = BASE | PRESETS[preset] | overrides
    shapes = text_shapes(text)
    if preset == "conditional":
        shapes = {f"language_model.{name}": shape for name, shape in shapes.items()} | vision_shapes(text)
    tensors = {name: _random(name, shape, seed).to(dtype) for name, shape in shapes.items()}
    if layout == "per_expert":
        tensors = _split_experts(tensors)
    write_shards(path, tensors, num_shards)
    _write_json(path / "config.json", config_json(preset, text, dtype))
    _write_json(path / "generation_config.json", generation_json(text))
    return path


def config_json(preset: str, text: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Spell `text` as the preset's config.json: flat, nested under text_config, or in the v5 keys."""
    dtype_name = str(dtype).removeprefix("torch.")
    if preset == "conditional":
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "boi_token_index": NUM_RANKS + 20,
            "eoi_token_index": NUM_RANKS + 21,
            "image_token_index": NUM_RANKS + 32,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "torch_dtype": dtype_name,
            "text_config": dict(text) | {"torch_dtype": dtype_name},
            "vision_config": VISION,
        }
    config = {"architectures": ["Llama4ForCausalLM"]} | dict(text)
    if preset != "v5":
        return config | {"torch_dtype": dtype_name}
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = scaling | {"rope_theta": config.pop("rope_theta")}
    num_layers, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    config["no_rope_layers"] = config["no_rope_layers"] or [int((i + 1) % 4 != 0) for i in range(num_layers)]
    config["layer_types"] = ["chunked_attention" if rope else "full_attention" for rope in config["no_rope_layers"]]
    config["moe_layers"] = list(range(step - 1, num_layers, step))
    return config | {"dtype": dtype_name}


def generation_json(text: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"do_sample": True, "temperature": 0.6, "top_p": 0.9} | tokens


def text_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every text tensor of the fused layout, in torch's [out, in] order."""
    D, V, F = text["hidden_size"], text["vocab_size"], text["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    step = text["interleave_moe_layer_step"]
    moe_layers = text.get("moe_layers")
    if moe_layers is None:
        moe_layers = range(step - 1, text["num_hidden_layers"], step)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _attention_shapes(text).items()}
        if layer in moe_layers:
            experts = text["num_local_experts"]
            shapes[f"{prefix}feed_forward.router.weight"] = (experts, D)
            shapes[f"{prefix}feed_forward.experts.gate_up_proj"] = (experts, D, 2 * F)
            shapes[f"{prefix}feed_forward.experts.down_proj"] = (experts, F, D)
        ffn = "feed_forward.shared_expert." if layer in moe_layers else "feed_forward."
        width = F if layer in moe_layers else text["intermediate_size_mlp"]
        for name, shape in {"gate": (width, D), "up": (width, D), "down": (D, width)}.items():
            shapes[f"{prefix}{ffn}{name}_proj.weight"] = shape
    shapes["model.norm.weight"] = (D,)
    return shapes if text["tie_word_embeddings"] else shapes | {"lm_head.weight": (V, D)}


def _attention_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    D, C = text["hidden_size"], text["head_dim"]
    q_width, kv_width = text["num_attention_heads"] * C, text["num_key_value_heads"] * C
    return {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (q_width, D),
        "self_attn.k_proj.weight": (kv_width, D),
        "self_attn.v_proj.weight": (kv_width, D),
        "self_attn.o_proj.weight": (D, q_width),
    }


def vision_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor outside the text model: encoder, adapter, projector."""
    W, F = VISION["hidden_size"], VISION["intermediate_size"]
    P, A = VISION["patch_size"], VISION["projector_output_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.linear.weight": (W, VISION["num_channels"] * P * P),
        "class_embedding": (W,),
        "positional_embedding_vlm": ((VISION["image_size"] // P) ** 2 + 1, W),
        "vision_adapter.mlp.fc1.weight": (VISION["projector_input_dim"], F),
        "vision_adapter.mlp.fc2.weight": (A, A),
    }
    linears = {f"self_attn.{name}_proj": (W, W) for name in "qkvo"} | {"mlp.fc1": (F, W), "mlp.fc2": (W, F)}
    norms = ["layernorm_pre", "layernorm_post"]
    for layer in range(VISION["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms += [f"{prefix}input_layernorm", f"{prefix}post_attention_layernorm"]
        for name, shape in linears.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (W,), f"{name}.bias": (W,)}
    projector = {"multi_modal_projector.linear_1.weight": (text["hidden_size"], VISION["vision_output_dim"])}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()} | projector


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    name = name.removeprefix("language_model.")  # a nested checkpoint holds the numbers of its flat twin
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return values * 0.2 + (0.0 if name.endswith("bias") else 1.0)
    fan_in = shape[1] if len(shape) > 1 else 4  # of [out, in] and of [E, in, out]
    gain = 2.0 if name.endswith(_STRONG) else 1.0
    return values * (gain / fan_in**0.5)


def _split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One [out, in] linear per expert in place of the fused input-major tensors."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, is_experts, kind = name.partition(".experts.")
        if not is_experts:
            split[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            parts = {"down_proj": weight}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2, dim=-1), strict=True))
            for part, matrix in parts.items():
                split[f"{prefix}.experts.{expert}.{part}.weight"] = matrix.T.contiguous()
    return split


def write_shards(path: Path, tensors: Mapping[str, Tensor], num_shards: int) -> None:
    """Write `tensors` as model.safetensors, or as `num_shards` files of consecutive tensors with their index."""
    if num_shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    weight_map = {name: files[i * num_shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        shard = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(shard, path / file, metadata={"format": "pt"})
    total_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(
        path / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
