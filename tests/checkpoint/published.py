"""config.json of the published models, key by key, as public sources quote them.

Scout and Maverick: AMD-AGI/Primus PR 165, aiconfigurator_core 0.12.0 (PyPI) and TensorRT-LLM's unit tests carry them.
Small dense: Meta's MobileLLM-R1 uses the same architecture without experts.
"""

from typing import Any

VISION: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "rope_theta": 10000,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
    "multi_modal_projector_bias": False,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
TEXT: dict[str, Any] = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_experts_per_tok": 1,
    "rope_theta": 500000.0,
    "attention_chunk_size": 8192,
    "no_rope_layers": [],
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
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "for_llm_compressor": False,
}
TOP: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": VISION,
}
SCOUT: dict[str, Any] = TOP | {
    "text_config": TEXT
    | {
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "max_position_embeddings": 10485760,
        "rope_scaling": {
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    }
}
MAVERICK: dict[str, Any] = TOP | {
    "text_config": TEXT
    | {
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "max_position_embeddings": 1048576,
        "rope_scaling": None,
    }
}
SMALL_DENSE: dict[str, Any] = TEXT | {
    "architectures": ["Llama4ForCausalLM"],
    "hidden_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 24,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "intermediate_size": 6144,
    "intermediate_size_mlp": 6144,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "interleave_moe_layer_step": 0,
    "moe_layers": [],
    "no_rope_layers": [1, 1, 1, 1],
    "layer_types": ["full_attention"] * 4,
    "attention_chunk_size": 32768,
    "attn_temperature_tuning": False,
    "use_qk_norm": True,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
# No published model: the geometry that fits what is known of Behemoth (16 experts, 288 B active, nearly 2 T).
BEHEMOTH: dict[str, Any] = SCOUT | {
    "text_config": SCOUT["text_config"]
    | {
        "hidden_size": 16384,
        "num_hidden_layers": 96,
        "num_attention_heads": 128,
        "intermediate_size": 24064,
        "intermediate_size_mlp": 48128,
    }
}
