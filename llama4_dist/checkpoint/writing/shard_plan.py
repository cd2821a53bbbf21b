"""Plans the safetensors files of a new checkpoint: which tensor lies where, and each file's header; pure.

Tensors keep their order. A shard is closed before it would outgrow the wanted size; a larger tensor has its own.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from llama4_dist.checkpoint.header import ITEM_BYTES, PREFIX_BYTES
from llama4_dist.checkpoint.index import SINGLE
from llama4_dist.checkpoint.writing.moves import Move

ALIGNMENT = 8  # of the data section, as the safetensors library pads it


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTensor:
    """A tensor to be written. `moves` bring its values; what none of them covers stays a hole, which reads as zeros."""

    name: str
    dtype: str  # safetensors' name: F32, BF16, F16, ...
    shape: tuple[int, ...]
    moves: tuple[Move, ...] = ()

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def bytes_moved(self) -> int:
        return sum(move.target.num_elements for move in self.moves) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One file: its header with the length in front, and its tensors with the byte of the file each begins at."""

    file: str
    header: bytes
    tensors: tuple[tuple[NewTensor, int], ...]
    num_bytes: int


def plan_shards(tensors: Sequence[NewTensor], shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Share `tensors` out over files of at most `shard_bytes` of data where tensors allow."""
    groups = list(_groups(tensors, shard_bytes))
    if len(groups) == 1:
        return (_shard(SINGLE, groups[0]),)
    return tuple(
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Iterable[ShardPlan]) -> str:
    """Return the index file's text."""
    placed = [(tensor, shard.file) for shard in shards for tensor, _ in shard.tensors]
    content = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor, _ in placed)},
        "weight_map": {tensor.name: file for tensor, file in placed},
    }
    return json.dumps(content, indent=2) + "\n"


def _groups(tensors: Sequence[NewTensor], shard_bytes: int) -> Iterable[list[NewTensor]]:
    group: list[NewTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.num_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.num_bytes
    yield group


def _shard(file: str, group: Sequence[NewTensor]) -> ShardPlan:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, begins = 0, []
    for tensor in group:
        stop = position + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        begins.append(position)
        position = stop
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    data_start = PREFIX_BYTES + len(raw)
    return ShardPlan(
        file=file,
        header=len(raw).to_bytes(PREFIX_BYTES, "little") + raw,
        tensors=tuple((tensor, data_start + begin) for tensor, begin in zip(group, begins, strict=True)),
        num_bytes=data_start + position,
    )
