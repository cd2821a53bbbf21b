"""Cuts a checkpoint into one directory per worker, each with what that worker opens and a manifest that says so.

A whole that only changes its shards gets a manifest too, so that both go by one model hash.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama4_dist.checkpoint.cluster_shape import ClusterShape
from llama4_dist.checkpoint.coverage import share_blocks
from llama4_dist.checkpoint.directory import allocated_bytes
from llama4_dist.checkpoint.expert_blocks import (
    ExpertRun,
    expert_blocks,
    expert_linears,
    part_blocks,
    part_names,
    part_shapes,
)
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.names import stored_prefix
from llama4_dist.checkpoint.part import PART, Part, config_hash, part_json
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.text_tensors import STORED_DTYPES
from llama4_dist.checkpoint.writing.directory import new_directory
from llama4_dist.checkpoint.writing.moves import Move, SideBySide
from llama4_dist.checkpoint.writing.original import Original, bytes_moved
from llama4_dist.checkpoint.writing.quantised_parts import cut_tensors
from llama4_dist.checkpoint.writing.shard_plan import NewTensor, plan_shards
from llama4_dist.checkpoint.writing.write import Counter, Progress, check_disk, write_checkpoint
from llama4_dist.errors import ConfigError
from llama4_dist.partition import Partition, shares_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """One directory: what it is called, what it holds, and the tensors with where their values come from."""

    name: str
    part: Part
    tensors: tuple[NewTensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPart:
    """What came out of one."""

    name: str
    num_tensors: int
    num_bytes: int
    allocated_bytes: int


def plan_parts(checkpoint: Checkpoint, shape: ClusterShape) -> tuple[PartPlan, ...]:
    """Return a part for each expert host, and for each stage of the attention side one with all it reads."""
    _check_whole(checkpoint)
    original = Original(checkpoint.path)
    return (*_host_parts(checkpoint, original, shape), *_stage_parts(checkpoint, original, shape.partition))


def plan_whole(checkpoint: Checkpoint) -> PartPlan:
    """Return all tensors, those that are not served too, for other shards."""
    _check_whole(checkpoint)
    original = Original(checkpoint.path)
    stored = original.entries
    names = [entry.name for entry in checkpoint.entries.values()] + list(checkpoint.unused)
    tensors = tuple(original.whole(stored[name]) for name in names)
    return PartPlan(name="whole", part=_part(checkpoint, "the whole", None), tensors=tensors)


def write_parts(
    checkpoint: Checkpoint,
    plans: Sequence[PartPlan],
    out: Path,
    *,
    shard_bytes: int,
    progress: Progress | None = None,
) -> list[WrittenPart]:
    """Write one plan into `out` itself, several into a folder each; all of them or nothing."""
    original = Original(checkpoint.path)
    beside = original.beside()
    all_shards = [plan_shards(plan.tensors, shard_bytes) for plan in plans]
    everything = [tensor for plan in plans for tensor in plan.tensors]
    counter = Counter(bytes_moved(everything), progress)
    with new_directory(out) as stage:
        check_disk(stage, [shard for shards in all_shards for shard in shards], original.needed_bytes(everything))
        for plan, shards in zip(plans, all_shards, strict=True):
            directory = stage if len(plans) == 1 else stage / plan.name
            directory.mkdir(exist_ok=True)
            write_checkpoint(directory, shards, {**beside, PART: part_json(plan.part).encode()}, counter)
    return [_written(plan, out if len(plans) == 1 else out / plan.name) for plan in plans]


def _host_parts(checkpoint: Checkpoint, original: Original, shape: ClusterShape) -> Iterator[PartPlan]:
    for host in shape.units:
        runs = shape.runs_of(checkpoint.config, host)
        if runs:
            tensors = [tensor for run in runs for tensor in _run_tensors(checkpoint, original, run)]
            yield PartPlan(name=host, part=_part(checkpoint, host, (), runs), tensors=tuple(tensors))


def _stage_parts(checkpoint: Checkpoint, original: Original, partition: Partition) -> Iterator[PartPlan]:
    for share in shares_of(checkpoint.config, partition):
        if share.rank == 0:
            name = "attention" if partition.num_stages == 1 else f"attention-{share.stage}"
            names = tuple(name for name, _ in share_blocks(checkpoint.config, share))
            tensors = tuple(original.whole(entry) for one in names for entry in _entries(checkpoint, one))
            yield PartPlan(name=name, part=_part(checkpoint, name, names), tensors=tensors)


def _run_tensors(checkpoint: Checkpoint, original: Original, run: ExpertRun) -> Iterator[NewTensor]:
    config, layout, scheme = checkpoint.config, checkpoint.layout, checkpoint.scheme
    if scheme is not None and expert_linears(run)[0].name in checkpoint.quantised:
        for cut, name in zip(expert_linears(run), part_names(layout, run), strict=True):
            stored_name = stored_prefix(config) + name
            yield from cut_tensors(original, checkpoint.quantised[cut.name], scheme, cut, stored_name)
        return
    there, here = expert_blocks(config, layout, run), part_blocks(config, layout, run, run)
    moves: dict[str, Move] = {}
    if here.gate_up is not None:
        gate, up = (original.matrix(checkpoint.entries[one.name], one.block) for one in (there.gate, there.up))
        moves[here.gate_up.name] = Move(source=SideBySide(gate, up), target=here.gate_up.block)
        if there.gate_up is not None:  # the whole width lies in one run
            source = original.matrix(checkpoint.entries[there.gate_up.name], there.gate_up.block)
            moves[here.gate_up.name] = Move(source=source, target=here.gate_up.block)
    for stored, target in zip(there, here, strict=True):
        if target.name not in moves:
            matrix = original.matrix(checkpoint.entries[stored.name], stored.block)
            moves[target.name] = Move(source=matrix, target=target.block)
    prefix, dtype = stored_prefix(config), STORED_DTYPES[config.dtype]
    for name, tensor in part_shapes(config, layout, run):
        yield NewTensor(name=prefix + name, dtype=dtype, shape=tensor, moves=(moves[name],))


def _entries(checkpoint: Checkpoint, name: str) -> Iterator[TensorEntry]:
    """Yield what a tensor of the model is stored as."""
    if name in checkpoint.quantised:
        yield from checkpoint.quantised[name].tensors()
    else:
        yield checkpoint.entries[name]


def _part(
    checkpoint: Checkpoint, label: str, tensors: tuple[str, ...] | None, experts: tuple[ExpertRun, ...] = ()
) -> Part:
    return Part(
        model_hash=checkpoint.model_hash,
        config_hash=config_hash(checkpoint.config),
        layout=checkpoint.layout,
        label=label,
        tensors=tensors,
        experts=experts,
    )


def _check_whole(checkpoint: Checkpoint) -> None:
    if checkpoint.part is not None and checkpoint.part.tensors is not None:
        raise ConfigError(
            f"{checkpoint.path} is {checkpoint.part.label}, a part of a checkpoint: cut parts from the whole"
        )


def _written(plan: PartPlan, directory: Path) -> WrittenPart:
    return WrittenPart(
        name=plan.name,
        num_tensors=len(plan.tensors),
        num_bytes=sum(tensor.num_bytes for tensor in plan.tensors),
        allocated_bytes=sum(allocated_bytes(file) for file in directory.iterdir()),
    )
