"""The geometry of a Llama 4 model as its config.json states it; plain data, no torch, no files.

Reading and checking config.json is `checkpoint.config_file`; nothing here has a default that could silently replace a
published value.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """llama3 frequency scaling: wavelengths beyond `original_max_position / low_freq_factor` grow by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Llama 4 text geometry. Letters in comments are the project's shape legend (docs/design.md)."""

    architecture: str  # Llama4ForCausalLM | Llama4ForConditionalGeneration
    dtype: str  # dtype the checkpoint was stored in: float32 | bfloat16 | float16
    hidden_size: int  # D
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # C
    expert_width: int  # F, also the shared expert's
    dense_width: int  # width of dense layers' FFN
    num_experts: int  # E
    experts_per_token: int  # K
    vocab_size: int  # V
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_layers: tuple[bool, ...]  # True = rotary, False = NoPE
    chunked_layers: tuple[bool, ...]  # True = attention inside chunks of `chunk_size`
    moe_layers: tuple[bool, ...]  # True = routed experts, False = dense FFN
    chunk_size: int | None
    use_qk_norm: bool
    temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    has_vision: bool = False

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        return tuple(layer for layer, is_moe in enumerate(self.moe_layers) if is_moe)
