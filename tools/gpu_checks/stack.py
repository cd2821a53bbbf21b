"""Models with random weights, made on the device, and the batches to run them on."""

from collections.abc import Sequence

import torch

from gpu_checks.harness import normal
from llama4_dist.config import ModelConfig, RopeScaling
from llama4_dist.gpu.model import GpuLlama4
from llama4_dist.gpu.packed import Packed
from llama4_dist.gpu.weights import LayerWeights, ModelWeights
from llama4_dist.model.batch import Batch, PageRun, SequenceSpan
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import layout_of

BLOCK_SIZE = 16


def scout_config(num_layers: int) -> ModelConfig:
    """Return the geometry of Llama 4 Scout with some of its 48 layers."""
    return _config(num_layers, width=5120, heads=40, kv_heads=8, expert_width=8192, vocab=202048, chunk=8192)


def small_config() -> ModelConfig:
    """Return a small geometry in which 700 tokens cross chunks and splits."""
    return _config(4, width=640, heads=10, kv_heads=2, expert_width=512, vocab=1024, chunk=256, head_dim=64)


def tiny_config() -> ModelConfig:
    """Return a geometry for the interpreter."""
    return _config(2, width=64, heads=4, kv_heads=2, expert_width=64, vocab=64, chunk=8, head_dim=16)


def _config(
    num_layers: int,
    *,
    width: int,
    heads: int,
    kv_heads: int,
    expert_width: int,
    vocab: int,
    chunk: int,
    head_dim: int = 128,
) -> ModelConfig:
    rope_layers = tuple((layer + 1) % 4 != 0 for layer in range(num_layers))
    return ModelConfig(
        architecture="Llama4ForCausalLM",
        dtype="bfloat16",
        hidden_size=width,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        expert_width=expert_width,
        dense_width=2 * expert_width,
        num_experts=16,
        experts_per_token=1,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position=8192),
        rope_layers=rope_layers,
        chunked_layers=rope_layers,
        moe_layers=(True,) * num_layers,
        chunk_size=chunk,
        use_qk_norm=True,
        temperature_tuning=True,
        floor_scale=float(chunk),
        attn_scale=0.1,
        tie_word_embeddings=False,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )


EXPERT_BITS = {"stored": 16.0, "float8": 8.0, "int4": 4.25}  # a weight, with its share of a four-bit group's scale


def layer_bytes(config: ModelConfig, *, experts: int | None = None, expert_format: str = "stored") -> int:
    """Return bytes of one layer's weights, bfloat16 beside the experts: with all of those, or with so many of them."""
    experts = config.num_experts if experts is None else experts
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim  # q and o, k and v
    expert = 3 * config.expert_width * (experts + 1) * EXPERT_BITS[expert_format] / 8
    return int(config.hidden_size * (2 * heads + expert + 2 * config.num_experts))


def random_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, expert_format: str = "stored"
) -> GpuLlama4:
    """Return a model whose weights have a standard deviation of 1/sqrt(fan in)."""

    def linear(*shape: int) -> Packed:
        return Packed(values_EFD=normal(*shape, device=device, dtype=dtype, scale=shape[-1] ** -0.5))

    width, inner = config.hidden_size, config.expert_width
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = tuple(
        LayerWeights(
            input_norm_D=1 + normal(width, device=device, dtype=dtype, scale=0.1),
            qkv=linear(1, q_width + 2 * kv_width, width),
            o=linear(1, width, q_width),
            post_attention_norm_D=1 + normal(width, device=device, dtype=dtype, scale=0.1),
            router_ED=normal(config.num_experts, width, device=device, dtype=dtype, scale=2 * width**-0.5),
            gate_up=linear(config.num_experts + 1, 2 * inner, width).quantized(expert_format),
            down=linear(config.num_experts + 1, width, inner).quantized(expert_format),
        )
        for _ in range(config.num_layers)
    )
    weights = ModelWeights(
        embedding_VD=normal(config.vocab_size, width, device=device, dtype=dtype),
        layers=layers,
        norm_D=1 + normal(width, device=device, dtype=dtype, scale=0.1),
        head=linear(1, config.vocab_size, width),
    )
    return GpuLlama4(config, weights)


def make_cache(config: ModelConfig, num_positions: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    """Return a cache for so many positions in every group of layers."""
    num_pages = -(-num_positions // BLOCK_SIZE) * len(layout_of(config).groups)
    return KVCache(config, num_pages=num_pages, block_size=BLOCK_SIZE, dtype=dtype, device=device)


def make_batch(model: GpuLlama4, parts: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> Batch:
    """Return a batch of (new tokens, positions already cached, places of the blocks), wanting all logits.

    A group of layers that sees a chunk gets no page before it, as in service.
    """
    groups = layout_of(model.config).groups

    def pages(num_cached: int, places: Sequence[int]) -> tuple[PageRun, ...]:
        firsts = [group.first_key(num_cached) // BLOCK_SIZE for group in groups]
        return tuple(
            PageRun(first_block=first, ids=tuple(place * len(groups) + number for place in places[first:]))
            for number, first in enumerate(firsts)
        )

    token_ids = [token for tokens, _, _ in parts for token in tokens]
    return Batch(
        step=1,
        token_ids_T=torch.tensor(token_ids, dtype=torch.int64, device=model.device),
        spans=tuple(
            SequenceSpan(num_tokens=len(tokens), num_cached=num_cached, pages=pages(num_cached, places))
            for tokens, num_cached, places in parts
        ),
        logit_rows=tuple(range(len(token_ids))),
    )
