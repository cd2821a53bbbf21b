"""The `llama4-dist checkpoint` commands and their flags; each one's work is in the file of its name."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.checkpoint_quantize import quantize
from llama4_dist.cli.flags import JsonFlag, parse_bytes

checkpoint_app = typer.Typer(
    name="checkpoint",
    help="Make, describe, prove, cut, convert and quantise checkpoints.",
    no_args_is_help=True,
)
checkpoint_app.command()(quantize)


class LayoutChoice(StrEnum):
    """How routed experts are stored."""

    FUSED = "fused"
    PER_EXPERT = "per_expert"


class StoredDtype(StrEnum):
    """What weights are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Target(StrEnum):
    """Whose names and shapes."""

    HF = "hf"
    META = "meta"


Directory = Annotated[Path, typer.Argument(help="Checkpoint folder.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder; it appears when everything is written.")]
ShardSize = Annotated[
    int, typer.Option(parser=parse_bytes, metavar="SIZE", help="Largest file, unless a tensor is larger [10GB].")
]
Hosts = Annotated[int | None, typer.Option(help="Expert hosts to place the experts on.")]
Slices = Annotated[int, typer.Option(help="Slices that each expert's width is cut into.")]
Replicas = Annotated[int, typer.Option(help="Hosts that hold each slice.")]
Stages = Annotated[int, typer.Option(help="Pipeline stages of the attention side.")]
Tensor = Annotated[int, typer.Option("--tensor", help="Tensor-parallel ranks of each stage.")]
Plan = Annotated[
    Path | None,
    typer.Option(help="Plan of `llama4-dist plan --out`, or who holds what (--save-plan), in place of the numbers."),
]
DEFAULT_SHARD = "10GB"


@checkpoint_app.command()
def synth(  # noqa: PLR0913 (flags of a command)
    preset: Annotated[str, typer.Option(help="scout, maverick, or behemoth (a synthetic geometry).")],
    out: Out,
    scale: Annotated[str, typer.Option(help="Divide all widths, e.g. 1/64; depth and experts stay.")] = "1",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of config.json; repeatable.")
    ] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Weights are holes: zeros that take no disk.")] = False,
    fill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="With --sparse: tensors that get random values. A glob over names "
            "('model.layers.0.feed_forward.experts.3.*', in either layout), or layers=A-B; repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With a tensor's name it fixes the tensor's values.")] = 0,
    dtype: Annotated[StoredDtype, typer.Option(help="What weights are stored in.")] = StoredDtype.BFLOAT16,
    layout: Annotated[LayoutChoice, typer.Option(help="How routed experts are stored.")] = LayoutChoice.FUSED,
    shard_size: ShardSize = DEFAULT_SHARD,  # type: ignore[assignment]
    as_json: JsonFlag = False,
) -> None:
    """Write a synthetic checkpoint: random weights, holes, or some of both."""
    from llama4_dist.checkpoint.names import ExpertLayout
    from llama4_dist.checkpoint.writing.synth import SynthRequest
    from llama4_dist.cli.checkpoint_synth import run_synth

    request = SynthRequest(
        preset=preset,
        scale=scale,
        overrides=tuple(settings or ()),
        seed=seed,
        dtype=dtype.value,
        layout=ExpertLayout(layout.value),
        is_sparse=sparse,
        fill=tuple(fill or ()),
        shard_bytes=shard_size,
    )
    run_synth(request, out, as_json)


@checkpoint_app.command()
def inspect(directory: Directory, as_json: JsonFlag = False) -> None:
    """Describe a checkpoint without loading it."""
    from llama4_dist.cli.inspect import run_inspect

    run_inspect(directory, as_json)


@checkpoint_app.command()
def verify(  # noqa: PLR0913 (flags of a command)
    directory: Directory,
    hosts: Hosts = None,
    slices: Slices = 1,
    replicas: Replicas = 1,
    stages: Stages = 1,
    tensor: Tensor = 1,
    plan: Plan = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan that was checked into this file.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: manifest hashes, NaN and Inf.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check headers, index and config; with a cluster's shape prove that each parameter is opened as often as meant."""
    from llama4_dist.cli.checkpoint_shape import ShapeFlags
    from llama4_dist.cli.checkpoint_verify import run_verify

    flags = ShapeFlags(hosts=hosts, slices=slices, replicas=replicas, stages=stages, ranks=tensor, plan=plan)
    run_verify(directory, flags, save_plan, deep, as_json)


@checkpoint_app.command()
def shard(  # noqa: PLR0913 (flags of a command)
    directory: Directory,
    out: Out,
    hosts: Hosts = None,
    host: Annotated[
        list[str] | None, typer.Option(help="Write only this part (expert-0, attention, …); repeatable.")
    ] = None,
    slices: Slices = 1,
    replicas: Replicas = 1,
    stages: Stages = 1,
    plan: Plan = None,
    shard_size: ShardSize = DEFAULT_SHARD,  # type: ignore[assignment]
    as_json: JsonFlag = False,
) -> None:
    """Cut a checkpoint into one folder per worker, or, without --hosts and --plan, write it in other shards."""
    from llama4_dist.cli.checkpoint_shape import ShapeFlags
    from llama4_dist.cli.checkpoint_write import run_shard

    flags = ShapeFlags(hosts=hosts, slices=slices, replicas=replicas, stages=stages, ranks=1, plan=plan)
    run_shard(directory, out, flags, tuple(host or ()), shard_size, as_json)


@checkpoint_app.command()
def convert(
    directory: Directory,
    out: Out,
    to: Annotated[Target, typer.Option(help="Whose names and shapes; always safetensors.")] = Target.HF,
    layout: Annotated[LayoutChoice, typer.Option(help="How routed experts are stored (with hf).")] = LayoutChoice.FUSED,
    shard_size: ShardSize = DEFAULT_SHARD,  # type: ignore[assignment]
    as_json: JsonFlag = False,
) -> None:
    """Write a checkpoint in another layout: Meta's, or Hugging Face's with fused or single experts."""
    from llama4_dist.cli.checkpoint_write import run_convert

    run_convert(directory, out, to.value, layout.value, shard_size, as_json)
