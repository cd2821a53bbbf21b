"""Sums up a checkpoint for people: what it is, how large it is, and what serving it costs per token."""

from dataclasses import dataclass

from llama4_dist.checkpoint.names import num_expert_parameters
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """Plain numbers; parameters and bytes are those of the text model, which is all that is served."""

    architecture: str
    dtype: str
    layout: str  # fused | per_expert | dense
    quantisation: str | None  # of the quantised linears, in words
    num_quantised: int  # linears
    num_parameters: int
    num_active_parameters: int  # a token passes through these
    num_bytes: int
    num_shards: int
    num_layers: int
    num_moe_layers: int
    num_nope_layers: int
    num_chunked_layers: int  # their cache stops growing at `chunk_size` tokens
    chunk_size: int | None
    num_experts: int
    experts_per_token: int
    expert_bytes: int  # one routed expert of the last MoE layer
    kv_bytes_per_token: int  # all layers, in the stored dtype, up to `chunk_size` tokens
    kv_bytes_per_token_beyond_chunk: int  # the layers that keep the whole sequence
    max_context: int
    num_unused_tensors: int  # vision, or unknown
    unused_bytes: int
    model_hash: str


def describe(checkpoint: Checkpoint) -> CheckpointSummary:
    """Return the summary of an opened checkpoint; reads no weights."""
    config = checkpoint.config
    kv_bytes = kv_bytes_per_token_and_layer(config)
    return CheckpointSummary(
        architecture=config.architecture,
        dtype=config.dtype,
        layout=checkpoint.layout.value if config.moe_layer_ids else "dense",
        quantisation=checkpoint.scheme.title if checkpoint.scheme else None,
        num_quantised=len(checkpoint.quantised),
        num_parameters=checkpoint.num_parameters,
        num_active_parameters=checkpoint.num_parameters - num_idle_parameters(config),
        num_bytes=checkpoint.total_bytes,
        num_shards=checkpoint.num_shards,
        num_layers=config.num_layers,
        num_moe_layers=sum(config.moe_layers),
        num_nope_layers=config.rope_layers.count(False),
        num_chunked_layers=sum(config.chunked_layers),
        chunk_size=config.chunk_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        expert_bytes=checkpoint.expert_bytes(config.moe_layer_ids[-1], 0) if config.moe_layer_ids else 0,
        kv_bytes_per_token=kv_bytes * config.num_layers,
        kv_bytes_per_token_beyond_chunk=kv_bytes * config.chunked_layers.count(False),
        max_context=config.max_position_embeddings,
        num_unused_tensors=len(checkpoint.unused),
        unused_bytes=checkpoint.unused_bytes,
        model_hash=checkpoint.model_hash,
    )


def num_idle_parameters(config: ModelConfig) -> int:
    """Parameters of the routed experts that one token does not visit, over all layers."""
    idle = config.num_experts - config.experts_per_token
    return len(config.moe_layer_ids) * idle * num_expert_parameters(config)


def kv_bytes_per_token_and_layer(config: ModelConfig) -> int:
    """Key and value of one token in one layer, in the stored dtype."""
    return 2 * config.num_kv_heads * config.head_dim * _ITEM_BYTES[config.dtype]
