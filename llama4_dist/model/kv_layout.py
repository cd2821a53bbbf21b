"""Which layers share a page of the KV cache, and which blocks of positions each kind keeps; pure, no tensors.

A page holds `block_size` positions of one group of layers. All groups have equally many layers, so all pages have one
size and one pool serves layers that keep everything and layers that keep their chunk: the idea of vLLM's hybrid KV
cache manager, and of Jenga (Zhang et al. 2025, arXiv:2503.18292).

Where stages hold the layers, page p of group g means the same block of positions in each of them: all stages have the
same groups, and a stage with fewer layers of a kind leaves groups of that kind empty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd

from llama4_dist.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers whose keys and values share pages; with a `chunk_size` they see the chunk of a position, else all."""

    layers: tuple[int, ...]
    chunk_size: int | None

    def first_key(self, position: int) -> int:
        """Return the first position that `position` sees."""
        return 0 if self.chunk_size is None else position // self.chunk_size * self.chunk_size

    def blocks(self, *, num_cached: int, end: int, num_known: int, block_size: int) -> range:
        """Return the blocks to hold while positions [num_cached, end) of a sequence of `num_known` are computed.

        That is what they see, and room up to the last known position, in chunked layers up to the chunk's end.
        """
        reach = num_known
        if self.chunk_size is not None:
            reach = min(num_known, self.first_key(end - 1) + self.chunk_size)
        return range(self.first_key(num_cached) // block_size, -(-reach // block_size))

    def max_blocks(self, num_tokens: int, block_size: int) -> int:
        """Return the most blocks a sequence holds on its way to `num_tokens`, if no step crosses a chunk edge."""
        blocks = -(-num_tokens // block_size)
        if self.chunk_size is None:
            return blocks
        straddles = self.chunk_size % block_size != 0  # then a chunk may begin and end inside a block
        return min(blocks, -(-self.chunk_size // block_size) + straddles)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The groups of a model, or of a stage; layer l is entry `index_in_group[l]` of a page of group `group_of[l]`."""

    groups: tuple[KVGroup, ...]
    group_of: Mapping[int, int] = field(init=False)
    index_in_group: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        places = {
            layer: (number, index)
            for number, group in enumerate(self.groups)
            for index, layer in enumerate(group.layers)
        }
        sizes = {len(group.layers) for group in self.groups if group.layers}
        if len(sizes) > 1 or len(places) != sum(len(group.layers) for group in self.groups):
            raise ValueError(f"groups {self.groups} must be of one size, or empty, and hold each layer once")
        object.__setattr__(self, "group_of", {layer: places[layer][0] for layer in sorted(places)})
        object.__setattr__(self, "index_in_group", {layer: places[layer][1] for layer in sorted(places)})

    @property
    def layers_per_group(self) -> int:
        return max(len(group.layers) for group in self.groups)

    def without_layers(self) -> "KVLayout":
        """Return the same groups for who counts pages and holds none of the keys and values."""
        return KVLayout(groups=tuple(KVGroup(layers=(), chunk_size=group.chunk_size) for group in self.groups))

    @property
    def chunk_size(self) -> int | None:
        """The chunk of those groups that have one."""
        return next((group.chunk_size for group in self.groups if group.chunk_size is not None), None)

    def next_edge(self, position: int) -> int | None:
        """Return the end of the chunk that `position` lies in."""
        return None if self.chunk_size is None else (position // self.chunk_size + 1) * self.chunk_size

    def blocks(self, *, num_cached: int, end: int, num_known: int, block_size: int) -> tuple[range, ...]:
        """Return `KVGroup.blocks` of each group."""
        return tuple(
            group.blocks(num_cached=num_cached, end=end, num_known=num_known, block_size=block_size)
            for group in self.groups
        )

    def max_pages(self, num_tokens: int, block_size: int) -> int:
        """Return the most pages a sequence holds on its way to `num_tokens`."""
        return sum(group.max_blocks(num_tokens, block_size) for group in self.groups)


def layout_of(config: ModelConfig) -> KVLayout:
    """Group a model's layers: with f full and c chunked layers, gcd(f, c) of one kind to a group."""
    return layouts_of(config, [range(config.num_layers)])[0]


def layouts_of(config: ModelConfig, stages: Sequence[range]) -> tuple[KVLayout, ...]:
    """Group the layers of each stage into the groups that all stages have.

    A group has as many layers as divide the number of each kind in every stage. Of a kind there are as many groups as
    the stage with most of its layers needs, so uneven stages leave parts of pages unused.
    """
    kinds = [_layers_by_kind(config, layers) for layers in stages]
    size = gcd(*(len(layers) for by_kind in kinds for layers in by_kind.values()))
    present = {chunk_size for by_kind in kinds for chunk_size in by_kind}
    most = {kind: max(len(by_kind.get(kind, ())) for by_kind in kinds) for kind in present}
    return tuple(
        KVLayout(
            groups=tuple(
                KVGroup(layers=tuple(by_kind.get(kind, ())[start : start + size]), chunk_size=kind)
                for kind in sorted(present, key=lambda kind: kind is not None)
                for start in range(0, most[kind], size)
            )
        )
        for by_kind in kinds
    )


def page_bytes(config: ModelConfig, *, block_size: int, dtype_bytes: int, layout: KVLayout | None = None) -> int:
    """Return the bytes of one page: keys and values of `block_size` positions of one group.

    For a member of a cut model pass the geometry of its part and its stage's layout; all members' pages have one size.
    """
    layers_per_group = (layout or layout_of(config)).layers_per_group
    return 2 * layers_per_group * config.num_kv_heads * config.head_dim * block_size * dtype_bytes


def _layers_by_kind(config: ModelConfig, layers: range) -> dict[int | None, list[int]]:
    by_chunk: dict[int | None, list[int]] = {}
    for layer in layers:
        by_chunk.setdefault(config.chunk_size if config.chunked_layers[layer] else None, []).append(layer)
    return by_chunk


def sequence_bytes(config: ModelConfig, num_tokens: int, *, block_size: int, dtype_bytes: int) -> int:
    """Return the bytes that a sequence of `num_tokens` holds at most."""
    size = page_bytes(config, block_size=block_size, dtype_bytes=dtype_bytes)
    return layout_of(config).max_pages(num_tokens, block_size) * size
