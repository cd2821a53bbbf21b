"""Plans the quantised checkpoint: which tensors each shard will hold, and what each is made of. Pure.

Every shard of the source becomes one of the same name. Fused experts come apart into one linear each.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from llama4_dist.checkpoint import names
from llama4_dist.checkpoint.header import ITEM_BYTES, PREFIX_BYTES, TensorEntry
from llama4_dist.checkpoint.index import Index
from llama4_dist.checkpoint.quantised_tensors import QUANTISABLE
from llama4_dist.checkpoint.scheme import Number, Scheme
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError

ALIGNMENT = 8  # of the data section, as the safetensors library writes it


class Targets(StrEnum):
    """Which linears are quantised: the routed experts', or those of attention and all feed-forward networks."""

    EXPERTS = "experts"
    LINEARS = "linears"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One tensor of the new checkpoint."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A tensor that stays as it is."""

    source: TensorEntry

    def outputs(self) -> tuple[Output, ...]:
        return (Output(name=self.source.name, dtype=self.source.dtype, shape=self.source.shape),)

    @property
    def source_bytes(self) -> int:
        return self.source.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantise:
    """A linear that is rounded: a tensor, or `columns` of matrix `index` of a stack, which is input-major."""

    source: TensorEntry
    name: str  # of the new linear's weight
    shape: tuple[int, int]  # [F, D]
    scheme: Scheme
    scale_dtype: str
    index: int | None = None
    columns: tuple[int, int] | None = None

    def outputs(self) -> tuple[Output, ...]:
        """Return the stored numbers, the scales, and where they are packed the shape."""
        num_outputs, width = self.shape
        scale = Output(
            name=self.name + "_scale", dtype=self.scale_dtype, shape=(num_outputs, self.scheme.num_groups(width))
        )
        if not self.scheme.is_packed:
            dtype = "F8_E4M3" if self.scheme.number is Number.FLOAT8 else "I8"
            return Output(name=self.name, dtype=dtype, shape=self.shape), scale
        words = -(-width * self.scheme.number.bits // 32)
        packed = Output(name=self.name + "_packed", dtype="I32", shape=(num_outputs, words))
        return packed, scale, Output(name=self.name + "_shape", dtype="I64", shape=(2,))

    @property
    def source_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * ITEM_BYTES[self.source.dtype]


Part = Copy | Quantise


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One file, and where each of its tensors lies."""

    name: str
    parts: tuple[Part, ...]

    @property
    def source_bytes(self) -> int:
        return sum(part.source_bytes for part in self.parts)

    def outputs(self) -> list[Output]:
        """Return the tensors in the file's order: wide numbers first, so that all are aligned."""
        outputs = [output for part in self.parts for output in part.outputs()]
        return sorted(outputs, key=lambda output: -ITEM_BYTES[output.dtype])

    def header(self) -> bytes:
        """Return the file's first bytes, up to its data."""
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for output in self.outputs():
            offsets = [position, position + output.num_bytes]
            content[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": offsets}
            position += output.num_bytes
        raw = json.dumps(content, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % ALIGNMENT)
        return len(raw).to_bytes(PREFIX_BYTES, "little") + raw

    def offsets(self) -> dict[str, int]:
        """Return where each tensor begins in the file."""
        position = len(self.header())
        found: dict[str, int] = {}
        for output in self.outputs():
            found[output.name] = position
            position += output.num_bytes
        return found

    @property
    def num_bytes(self) -> int:
        return len(self.header()) + sum(output.num_bytes for output in self.outputs())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The new checkpoint's shards, and the linears in it that stay in floats."""

    shards: tuple[ShardPlan, ...]
    ignore: tuple[str, ...]

    def weight_map(self) -> dict[str, str]:
        return {output.name: shard.name for shard in self.shards for output in shard.outputs()}


def plan_quantisation(config: ModelConfig, index: Index, scheme: Scheme, targets: Targets) -> Plan:
    """Return the plan; ConfigError for a linear whose inputs do not divide into the scheme's groups."""
    files: dict[str, list[Part]] = {name: [] for name in sorted(index.shards)}
    stacks = _expert_stacks(config)
    for name, entry in index.entries.items():
        if name in index.unlisted:
            continue
        if name in stacks:
            files[entry.file] += _taken_apart(config, entry, scheme, *stacks[name])
        elif _is_target(name, targets):
            shape = (entry.shape[0], entry.shape[1])
            files[entry.file].append(_linear(entry, name, shape, scheme))
        else:
            files[entry.file].append(Copy(source=entry))
    shards = tuple(ShardPlan(name=name, parts=tuple(parts)) for name, parts in files.items() if parts)
    ignore = tuple(
        part.source.name.removesuffix(".weight") for shard in shards for part in shard.parts if _is_plain_linear(part)
    )
    return Plan(shards=shards, ignore=ignore)


def _expert_stacks(config: ModelConfig) -> Mapping[str, tuple[int, bool]]:
    """Return the stored names of fused experts, each with its layer and whether it is gate and up."""
    prefix = names.stored_prefix(config)
    stacks = {prefix + names.gate_up_name(layer): (layer, True) for layer in config.moe_layer_ids}
    return stacks | {prefix + names.down_name(layer): (layer, False) for layer in config.moe_layer_ids}


def _taken_apart(
    config: ModelConfig, entry: TensorEntry, scheme: Scheme, layer: int, is_gate_up: bool
) -> Iterator[Quantise]:
    width, inner = config.hidden_size, config.expert_width
    parts = {"gate": (0, inner), "up": (inner, 2 * inner)} if is_gate_up else {"down": (0, width)}
    shape = (inner, width) if is_gate_up else (width, inner)
    for expert in range(config.num_experts):
        for part, columns in parts.items():
            name = names.stored_prefix(config) + names.expert_linear_name(layer, expert, part)
            yield _linear(entry, name, shape, scheme, index=expert, columns=columns)


def _linear(
    entry: TensorEntry,
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    *,
    index: int | None = None,
    columns: tuple[int, int] | None = None,
) -> Quantise:
    try:
        scheme.num_groups(shape[1])
    except ValueError as error:
        raise ConfigError(f"tensor {name!r}: {error}: choose a group size that divides them") from None
    return Quantise(
        source=entry,
        name=name,
        shape=shape,
        scheme=scheme,
        scale_dtype=entry.dtype,
        index=index,
        columns=columns,
    )


def _is_target(name: str, targets: Targets) -> bool:
    if names.is_vision(name) or not name.endswith(QUANTISABLE):
        return False
    return targets is Targets.LINEARS or ".feed_forward.experts." in name


def _is_plain_linear(part: Part) -> bool:
    is_matrix = isinstance(part, Copy) and len(part.source.shape) == 2
    return is_matrix and part.source.name.endswith(".weight") and not part.source.name.endswith(names.EMBEDDING)
