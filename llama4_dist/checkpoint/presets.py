"""The family's geometries as the config.json of a text-only checkpoint; no weights, and none are implied.

Scout and Maverick are published; sources: AMD-AGI/Primus PR 165, aiconfigurator_core 0.12.0 (PyPI), TensorRT-LLM's unit
tests. **Behemoth is synthetic**: of it only 16 experts, 288B active and about 2T parameters were ever published. This
geometry has 288.5B active and 1991.7B in all (1992.6B with the family's vision encoder); it is the project's own.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llama4_dist.checkpoint.config_file import parse_config
from llama4_dist.config import ModelConfig

_COMMON: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "no_rope_layers": [],
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "max_position_embeddings": 10485760,
    "vocab_size": 202048,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "scout": _COMMON,
        "maverick": _COMMON
        | {
            "num_local_experts": 128,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "rope_scaling": None,
            "max_position_embeddings": 1048576,
        },
        "behemoth": _COMMON
        | {
            "hidden_size": 16384,
            "num_hidden_layers": 96,
            "num_attention_heads": 128,
            "intermediate_size": 24064,
            "intermediate_size_mlp": 48128,
        },
    }
)
SYNTHETIC = frozenset({"behemoth"})  # geometries that nobody has published


def preset_config(name: str) -> dict[str, Any]:
    """Return the config.json of a member of the family; ValueError for a name that is none."""
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no geometry of the family: choose one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])


def preset(name: str) -> ModelConfig:
    """Return the geometry of a member of the family; ValueError for a name that is none."""
    return parse_config(json.dumps(preset_config(name)).encode())
