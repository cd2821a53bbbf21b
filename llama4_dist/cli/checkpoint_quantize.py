"""`llama4-dist checkpoint quantize DIR --format F --out DIR2`: write a checkpoint's linears as fp8, int8 or int4."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama4_dist.cli.flags import JsonFlag

if TYPE_CHECKING:
    from llama4_dist.checkpoint.quantising.journal import TensorError
    from llama4_dist.checkpoint.quantising.run import Result
    from llama4_dist.checkpoint.scheme import Scheme

INT4_GROUP = 128
NUM_WORST = 10


class FormatChoice(StrEnum):
    """fp8: e4m3, rows rounded too (W8A8). int8, int4: weights alone."""

    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class TargetsChoice(StrEnum):
    """Which linears are quantised."""

    EXPERTS = "experts"
    LINEARS = "linears"


def quantize(
    directory: Annotated[Path, typer.Argument(help="Checkpoint folder with float32, bfloat16 or float16 weights.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint; an interrupted run goes on there.")],
    number_format: Annotated[FormatChoice, typer.Option("--format", help="What a weight becomes.")],
    group_size: Annotated[
        int | None,
        typer.Option(min=0, help="Inputs that share a scale; 0 = all of an output. int4: 128, otherwise 0."),
    ] = None,
    targets: Annotated[
        TargetsChoice, typer.Option(help="Routed experts, or the linears of attention and all feed-forward networks.")
    ] = TargetsChoice.EXPERTS,
    as_json: JsonFlag = False,
) -> None:
    """Quantise a checkpoint: shard by shard, resumable, with the error of every tensor in quantisation.json."""
    from llama4_dist.checkpoint.quantising.plan import Targets
    from llama4_dist.checkpoint.quantising.run import quantise_checkpoint
    from llama4_dist.cli.output import print_json, reporting
    from llama4_dist.cli.progress import byte_progress

    with reporting(as_json):
        scheme = scheme_of(number_format, group_size)
        with byte_progress("Quantising", show=not as_json) as progress:
            result = quantise_checkpoint(directory, out, scheme, targets=Targets(targets.value), progress=progress)
    if as_json:
        print_json(summary(result, scheme, out))
    else:
        show(result, scheme, out)


def scheme_of(number_format: FormatChoice, group_size: int | None) -> "Scheme":
    """Return the scheme that the flags name; ConfigError for a group size that the format does not have."""
    from llama4_dist.checkpoint.scheme import Number, Scheme
    from llama4_dist.errors import ConfigError

    if number_format is FormatChoice.FP8:
        if group_size:
            raise ConfigError(f"--group-size {group_size} is not for fp8, which has one scale an output: leave it out")
        return Scheme(number=Number.FLOAT8)
    number = Number(number_format.value)
    if group_size is None:
        group_size = INT4_GROUP if number is Number.INT4 else 0
    if group_size % 2:
        raise ConfigError(f"--group-size {group_size} is odd: give an even number, or 0 for one scale an output")
    return Scheme(number=number, group_size=group_size or None, is_packed=True)


def summary(result: "Result", scheme: "Scheme", out: Path) -> dict[str, Any]:
    """Return what scripts are told; the errors of all tensors are in the new folder's quantisation.json."""
    from dataclasses import asdict

    return {
        "out": str(out),
        "scheme": asdict(scheme),
        "shards": list(result.shards),
        "kept": list(result.kept),
        "bytes": result.num_bytes,
        "source_bytes": result.source_bytes,
        "tensors": len(result.errors),
        "mean_relative_error": mean_relative(result.errors),
        "worst": [asdict(error) for error in worst(result.errors)],
    }


def show(result: "Result", scheme: "Scheme", out: Path) -> None:
    """Show people what was written and which tensors lost most."""
    from llama4_dist.cli.output import human_bytes, print_pairs, print_rows

    rows = [
        (
            error.name.partition("layers.")[2].removesuffix(".weight"),
            f"{error.largest:.3g}",
            f"{error.relative:.4f}",
            "exact" if error.sqnr_db is None else f"{error.sqnr_db:.1f}",
        )
        for error in worst(result.errors)
    ]
    columns = ("layer.linear", "largest error", "relative RMS", "SQNR, dB")
    print_rows(f"{len(rows)} tensors that lost most", columns, rows)
    print_pairs(
        str(out),
        {
            "format": scheme.title,
            "shards": f"{len(result.shards)}, {len(result.kept)} of them kept from a run before",
            "size": f"{human_bytes(result.num_bytes)} from {human_bytes(result.source_bytes)}",
            "quantised": f"{len(result.errors):,} linears, mean relative RMS error {mean_relative(result.errors):.4f}",
            "errors of all": str(out / "quantisation.json"),
        },
    )


def worst(errors: "Sequence[TensorError]") -> "list[TensorError]":
    return sorted(errors, key=lambda error: -error.relative)[:NUM_WORST]


def mean_relative(errors: "Sequence[TensorError]") -> float:
    return sum(error.relative for error in errors) / len(errors)
