"""States which tensors a Llama 4 geometry has, by name and shape; pure: no files, no torch.

The canonical name is that of a text-only checkpoint ("model.norm.weight"); a nested one stores it under
`language_model.`. Fused expert tensors are input-major (x @ W), linears are [out, in].
Source: transformers `models/llama4/modeling_llama4.py`.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum

from llama4_dist.config import ModelConfig

Shape = tuple[int, ...]
NESTED = "language_model."
VISION = ("vision_model.", "multi_modal_projector.")
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class ExpertLayout(StrEnum):
    """How routed experts are stored: one tensor per layer, or one linear per expert."""

    FUSED = "fused"
    PER_EXPERT = "per_expert"


def stored_prefix(config: ModelConfig) -> str:
    """Return what stands before every canonical text name in the shards."""
    return NESTED if config.architecture == "Llama4ForConditionalGeneration" else ""


def is_vision(stored_name: str) -> bool:
    return stored_name.startswith(VISION)


def gate_up_name(layer: int) -> str:
    return f"model.layers.{layer}.feed_forward.experts.gate_up_proj"


def down_name(layer: int) -> str:
    return f"model.layers.{layer}.feed_forward.experts.down_proj"


def is_routed(name: str) -> bool:
    """Whether a canonical name is that of routed experts' weights, in either layout."""
    return ".feed_forward.experts." in name


def expert_linear_name(layer: int, expert: int, projection: str) -> str:
    """`projection` is gate, up or down."""
    return f"model.layers.{layer}.feed_forward.experts.{expert}.{projection}_proj.weight"


def expected_tensors(config: ModelConfig, layout: ExpertLayout = ExpertLayout.FUSED) -> dict[str, Shape]:
    """Return every text tensor by canonical name. A tied head is the embedding and not listed."""
    width = config.hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, width)}
    for layer, is_moe in enumerate(config.moe_layers):
        shapes.update(_attention(config, layer))
        shapes.update(_moe(config, layer, layout) if is_moe else _dense(config, layer))
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, width)
    return shapes


def num_expert_parameters(config: ModelConfig) -> int:
    """Parameters of one routed expert (or of one shared expert)."""
    return 3 * config.hidden_size * config.expert_width


def _attention(config: ModelConfig, layer: int) -> Mapping[str, Shape]:
    width = config.hidden_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.input_layernorm.weight": (width,),
        f"{prefix}.post_attention_layernorm.weight": (width,),
        f"{prefix}.self_attn.q_proj.weight": (q_width, width),
        f"{prefix}.self_attn.k_proj.weight": (kv_width, width),
        f"{prefix}.self_attn.v_proj.weight": (kv_width, width),
        f"{prefix}.self_attn.o_proj.weight": (width, q_width),
    }


def _dense(config: ModelConfig, layer: int) -> Mapping[str, Shape]:
    return dict(_swiglu(f"model.layers.{layer}.feed_forward", config.hidden_size, config.dense_width))


def _moe(config: ModelConfig, layer: int, layout: ExpertLayout) -> Mapping[str, Shape]:
    width, expert_width, num_experts = config.hidden_size, config.expert_width, config.num_experts
    prefix = f"model.layers.{layer}.feed_forward"
    shapes: dict[str, Shape] = {f"{prefix}.router.weight": (num_experts, width)}
    shapes.update(_swiglu(f"{prefix}.shared_expert", width, expert_width))
    if layout is ExpertLayout.FUSED:
        shapes[gate_up_name(layer)] = (num_experts, width, 2 * expert_width)
        shapes[down_name(layer)] = (num_experts, expert_width, width)
        return shapes
    for expert in range(num_experts):
        shapes.update(_swiglu(f"{prefix}.experts.{expert}", width, expert_width))
    return shapes


def _swiglu(prefix: str, width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (inner, width)
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)
