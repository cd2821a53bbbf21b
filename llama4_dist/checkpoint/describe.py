"""Sums up a checkpoint for people: what it is, how large it is, and what serving it costs per token."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from llama4_dist.checkpoint.directory import allocated_bytes
from llama4_dist.checkpoint.expert_format import most_bytes
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.names import EMBEDDING, LM_HEAD, expected_tensors, num_expert_parameters
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.synthetic import Origin, read_origin
from llama4_dist.config import ModelConfig

_NETWORKS = {".shared_expert.": "shared experts", ".experts.": "routed experts", "": "dense networks"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """Plain numbers; parameters and bytes are those of the text model, which is all that is served."""

    architecture: str
    dtype: str
    layout: str  # fused | per_expert | dense
    quantisation: str | None  # of the quantised linears, in words
    num_quantised: int  # linears
    num_parameters: int  # what the directory holds
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
    expert_bytes: int  # one routed expert of one layer, the largest
    kv_bytes_per_token: int  # all layers, in the stored dtype, up to `chunk_size` tokens
    kv_bytes_per_token_beyond_chunk: int  # the layers that keep the whole sequence
    max_context: int
    num_unused_tensors: int  # vision, or unknown
    unused_bytes: int
    model_hash: str
    parameters_by_kind: Mapping[str, int]
    file_bytes: int  # as long as the shards are
    allocated_bytes: int  # what they take on the disk: less where they have holes
    origin: Origin | None  # how a synthetic checkpoint was made
    part: str | None  # what a directory holds that is not the whole checkpoint

    @property
    def is_sparse(self) -> bool:
        """Whether a noticeable part of the weights is holes; compressing file systems look alike."""
        return self.allocated_bytes < 0.95 * self.file_bytes


def describe(checkpoint: Checkpoint) -> CheckpointSummary:
    """Return the summary of an opened checkpoint; reads no weights."""
    config, part = checkpoint.config, checkpoint.part
    files = [checkpoint.path / name for name in checkpoint.shard_names]
    kv_bytes = kv_bytes_per_token_and_layer(config)
    return CheckpointSummary(
        architecture=config.architecture,
        dtype=config.dtype,
        layout=checkpoint.layout.value if config.moe_layer_ids else "dense",
        quantisation=checkpoint.scheme.title if checkpoint.scheme else None,
        num_quantised=len(checkpoint.quantised),
        num_parameters=checkpoint.num_parameters,
        num_active_parameters=sum(map(prod, expected_tensors(config).values())) - num_idle_parameters(config),
        num_bytes=checkpoint.total_bytes,
        num_shards=checkpoint.num_shards,
        num_layers=config.num_layers,
        num_moe_layers=sum(config.moe_layers),
        num_nope_layers=config.rope_layers.count(False),
        num_chunked_layers=sum(config.chunked_layers),
        chunk_size=config.chunk_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        expert_bytes=most_bytes(checkpoint.expert_formats, config.hidden_size, config.expert_width),
        kv_bytes_per_token=kv_bytes * config.num_layers,
        kv_bytes_per_token_beyond_chunk=kv_bytes * config.chunked_layers.count(False),
        max_context=config.max_position_embeddings,
        num_unused_tensors=len(checkpoint.unused),
        unused_bytes=checkpoint.unused_bytes,
        model_hash=checkpoint.model_hash,
        parameters_by_kind=parameters_by_kind(checkpoint.entries),
        file_bytes=sum(file.stat().st_size for file in files),
        allocated_bytes=sum(map(allocated_bytes, files)),
        origin=read_origin(checkpoint.path),
        part=part.label if part and part.tensors is not None else None,
    )


def parameters_by_kind(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Count elements by what they are part of, in the order of a token's path."""
    counts = dict.fromkeys(("embedding", "attention", "norms", "router", *_NETWORKS.values(), "head"), 0)
    for name, entry in entries.items():
        counts[_kind(name)] += entry.num_elements
    return {kind: count for kind, count in counts.items() if count}


def _kind(name: str) -> str:
    if name in (EMBEDDING, LM_HEAD):
        return "embedding" if name == EMBEDDING else "head"
    if "norm" in name:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    if name.endswith("router.weight"):
        return "router"
    return next((kind for part, kind in _NETWORKS.items() if part in name), _NETWORKS[""])


def num_idle_parameters(config: ModelConfig) -> int:
    """Parameters of the routed experts that one token does not visit, over all layers."""
    idle = config.num_experts - config.experts_per_token
    return len(config.moe_layer_ids) * idle * num_expert_parameters(config)


def expert_bytes(config: ModelConfig) -> int:
    """One routed expert of one layer, as stored."""
    return num_expert_parameters(config) * _ITEM_BYTES[config.dtype]


def kv_bytes_per_token_and_layer(config: ModelConfig) -> int:
    """Key and value of one token in one layer, in the stored dtype."""
    return 2 * config.num_kv_heads * config.head_dim * _ITEM_BYTES[config.dtype]
