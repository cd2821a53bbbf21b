"""What a layout asks of each GPU's memory, and how many sequences and positions the rest holds."""

from bisect import bisect_right
from dataclasses import dataclass

from llama4_dist.model.kv_layout import page_bytes
from llama4_dist.planner import formats
from llama4_dist.planner.geometry import KV_BLOCK, Geometry
from llama4_dist.planner.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one GPU. The attention side is cut evenly over P x T; keys over P x min(T, KV heads)."""

    attention_weights: float
    kv_per_sequence: float
    kv: float
    expert_weights: float
    per_gpu: float  # what may be used: the device's memory less what is kept free

    @property
    def attention(self) -> float:
        return self.attention_weights + self.kv

    @property
    def attention_fits(self) -> bool:
        return self.attention <= self.per_gpu

    @property
    def experts_fit(self) -> bool:
        return self.expert_weights <= self.per_gpu

    @property
    def most_sequences(self) -> int:
        """How many sequences of this context a group's memory holds."""
        return max(0, int((self.per_gpu - self.attention_weights) // self.kv_per_sequence))


def memory_of(geometry: Geometry, layout: Layout, context: int, per_gpu: float) -> Memory:
    """Return the bytes of an attention GPU and of the fullest expert GPU.

    Slices are placed evenly over all layers together, so the fullest host has at most one more than the emptiest.
    """
    weight_bytes = formats.weight_bytes(layout.dtype)
    per_sequence = _kv_per_sequence(geometry, layout, context)
    return Memory(
        attention_weights=geometry.trunk_parameters * weight_bytes / layout.gpus_per_group,
        kv_per_sequence=per_sequence,
        kv=layout.sequences * per_sequence,
        expert_weights=slices_per_host(geometry, layout)
        * geometry.expert_parameters
        * weight_bytes
        / (layout.slices * layout.gpus_per_host),
        per_gpu=per_gpu,
    )


def slices_per_host(geometry: Geometry, layout: Layout) -> int:
    """Return how many (layer, expert, slice) copies the fullest host holds."""
    copies = geometry.num_moe_layers * geometry.config.num_experts * layout.slices * layout.replicas
    return -(-copies // layout.hosts)


def longest_context(geometry: Geometry, layout: Layout, memory: Memory) -> int:
    """Return the longest context at which the whole batch fits, at most the model's own; 0 if not one token does.

    Chunked layers stop growing at their chunk, so beyond it only the full layers count.
    """
    room = (memory.per_gpu - memory.attention_weights) / layout.sequences
    positions = range(1, geometry.config.max_position_embeddings + 1)
    return bisect_right(positions, room, key=lambda context: _kv_per_sequence(geometry, layout, context))


def num_kv_blocks(geometry: Geometry, layout: Layout, memory: Memory, *, block_size: int = KV_BLOCK) -> int:
    """Return how many pages of `block_size` positions the memory beside the weights holds, as engines count them."""
    whole = page_bytes(geometry.config, block_size=block_size, dtype_bytes=formats.kv_bytes(layout.kv_dtype))
    page = whole / _kv_share(geometry, layout)
    return max(0, int((memory.per_gpu - memory.attention_weights) // page))


def _kv_share(geometry: Geometry, layout: Layout) -> int:
    return layout.stages * min(layout.ranks, geometry.config.num_kv_heads)


def _kv_per_sequence(geometry: Geometry, layout: Layout, context: int) -> float:
    whole = geometry.kv_bytes_per_sequence(context, formats.kv_bytes(layout.kv_dtype))
    return whole / _kv_share(geometry, layout)
