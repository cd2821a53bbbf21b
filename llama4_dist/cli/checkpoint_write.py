"""`llama4-dist checkpoint shard` and `convert`: write a checkpoint again, in parts, other shards or another layout."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.text_tensors import META_EMBEDDING
from llama4_dist.checkpoint.writing.convert import to_hugging_face, to_layout, to_meta, write_converted
from llama4_dist.checkpoint.writing.original import Original
from llama4_dist.checkpoint.writing.parts import PartPlan, plan_parts, plan_whole, write_parts
from llama4_dist.cli.checkpoint_shape import ShapeFlags
from llama4_dist.cli.output import human_bytes, print_json, print_pairs, print_rows, reporting
from llama4_dist.cli.progress import byte_progress
from llama4_dist.errors import ConfigError


def run_shard(
    directory: Path, out: Path, flags: ShapeFlags, only: Sequence[str], shard_bytes: int, as_json: bool
) -> None:
    """Write one folder per worker of the plan, or those of `only`; without a plan the whole in other shards."""
    with reporting(as_json), byte_progress("Copying", show=not as_json) as progress:
        checkpoint = Checkpoint.open(directory)
        try:
            plans = _plans(checkpoint, flags, only)
            written = write_parts(checkpoint, plans, out, shard_bytes=shard_bytes, progress=progress)
        finally:
            checkpoint.close()
    if as_json:
        print_json({"model_hash": checkpoint.model_hash, "parts": [asdict(part) for part in written]})
        return
    rows = [(p.name, p.num_tensors, human_bytes(p.num_bytes), human_bytes(p.allocated_bytes)) for p in written]
    print_rows(str(out), ["part", "tensors", "size", "on disk"], rows)


def run_convert(directory: Path, out: Path, to: str, layout: str, shard_bytes: int, as_json: bool) -> None:
    """Write the checkpoint in the layout asked for."""
    with reporting(as_json), byte_progress("Converting", show=not as_json) as progress:
        if to == "meta":
            tensors = to_meta(directory)
        elif META_EMBEDDING in Original(directory).entries:
            tensors = to_hugging_face(directory, ExpertLayout(layout))
        else:
            tensors = to_layout(directory, ExpertLayout(layout))
        converted = write_converted(directory, tensors, out, shard_bytes=shard_bytes, progress=progress)
    if as_json:
        print_json(asdict(converted))
        return
    pairs = {"tensors": converted.num_tensors, "size": human_bytes(converted.num_bytes), "files": converted.num_files}
    print_pairs(str(out), pairs)


def _plans(checkpoint: Checkpoint, flags: ShapeFlags, only: Sequence[str]) -> list[PartPlan]:
    if not flags.is_given:
        if only:
            raise ConfigError("--host names a part of a plan: give --hosts or --plan too")
        return [plan_whole(checkpoint)]
    plans = plan_parts(checkpoint, flags.shape(checkpoint))
    names = [plan.name for plan in plans]
    for name in only:
        if name not in names:
            raise ConfigError(f"--host {name!r} is no part of the plan: choose one of {', '.join(names)}")
    return [plan for plan in plans if not only or plan.name in only]
