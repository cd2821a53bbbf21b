"""The tiny geometries the tests run on: one per member of the family and per spelling of config.json."""

from typing import Any

NUM_RANKS = 256  # special tokens follow the ranks, as in the published tokenizer (200000 there)
BOS, EOS, PAD = NUM_RANKS, [NUM_RANKS + 1, NUM_RANKS + 7, NUM_RANKS + 8], NUM_RANKS + 18

# Chunks of 16 and a floor of 32 let a prompt of 100 tokens cross chunk edges and change its attention temperature.
BASE: dict[str, Any] = {
    "model_type": "llama4_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "intermediate_size_mlp": 160,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "vocab_size": 320,
    "use_qk_norm": True,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "no_rope_layers": [],
    "attention_chunk_size": 16,
    "attn_temperature_tuning": True,
    "floor_scale": 32,
    "attn_scale": 0.5,  # 0.1 is published; 1 + 0.1 ln 4 would hardly show in 100 tokens
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,  # low == high, as published: no band between stretched and kept
    "original_max_position_embeddings": 64,
}
PRESETS: dict[str, dict[str, Any]] = {
    "scout": {"rope_scaling": LLAMA3_SCALING},
    "maverick": {
        "num_attention_heads": 8,  # 8 heads of 16 on a width of 64: head_dim is not D/H
        "num_local_experts": 32,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
    },
    "behemoth": {"head_dim": 32, "rope_scaling": LLAMA3_SCALING},
    "dense": {  # the shape of Meta's small dense models: no experts, no NoPE, no chunks in reach, tied head
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "no_rope_layers": [1, 1, 1, 1],
        "layer_types": ["full_attention"] * 4,
        "attention_chunk_size": 32768,
        "attn_temperature_tuning": False,
        "tie_word_embeddings": True,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "head_dim": 32,
    },
    "topk2": {  # irregular lists that no interval could produce
        "num_hidden_layers": 6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "moe_layers": [1, 2, 5],
        "no_rope_layers": [1, 0, 1, 1, 0, 1],
        "head_dim": 32,
    },
    "v5": {"num_hidden_layers": 8, "interleave_moe_layer_step": 2, "rope_scaling": LLAMA3_SCALING},
    "conditional": {"rope_scaling": LLAMA3_SCALING},
}
VISION: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_channels": 3,
    "intermediate_size": 128,  # 4 x hidden: what pixel shuffle hands the adapter
    "image_size": 28,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
    "vision_feature_select_strategy": "default",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
