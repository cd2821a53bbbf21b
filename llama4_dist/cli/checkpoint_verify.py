"""`llama4-dist checkpoint verify`: agreement of the files, coverage by a cluster, and with --deep every byte."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from llama4_dist.checkpoint.cluster_shape import ClusterShape, shape_json
from llama4_dist.checkpoint.coverage import Coverage, CoverageFault, prove_coverage
from llama4_dist.checkpoint.header import ITEM_BYTES
from llama4_dist.checkpoint.quantised_blocks import as_bytes
from llama4_dist.checkpoint.quantised_tensors import PACKED
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.cli.checkpoint_shape import ShapeFlags
from llama4_dist.cli.output import EXIT_FAILED, console, error_console, print_json, reporting
from llama4_dist.cli.progress import byte_progress
from llama4_dist.errors import ConfigError


def run_verify(directory: Path, flags: ShapeFlags, save_plan: Path | None, deep: bool, as_json: bool) -> None:
    """Verify what was asked for; exit with 1 if coverage fails and 3 if the checkpoint itself is wrong."""
    started = time.monotonic()
    shape, coverage = None, None
    with reporting(as_json):
        checkpoint = Checkpoint.open(directory)
        try:
            if flags.is_given:
                _check_whole(checkpoint)
                shape = flags.shape(checkpoint)
                coverage = prove_coverage(
                    checkpoint.config,
                    checkpoint.layout,
                    shape,
                    quantised=checkpoint.quantised,
                    scheme=checkpoint.scheme,
                )
                _save(save_plan, shape)
            if deep:
                with byte_progress("Verifying", show=not as_json) as progress:
                    checkpoint.verify(progress)
        finally:
            checkpoint.close()
    faults = [_fault(checkpoint, fault) for fault in coverage.faults] if coverage else []
    report = _report(checkpoint, shape, coverage, deep) | {"faults": faults}
    report["seconds"] = round(time.monotonic() - started, 3)
    if as_json:
        print_json(report)
    else:
        _show(report, coverage)
    if faults:
        raise typer.Exit(EXIT_FAILED)


def _check_whole(checkpoint: Checkpoint) -> None:
    if checkpoint.part is not None and checkpoint.part.tensors is not None:
        raise ConfigError(
            f"{checkpoint.path} is {checkpoint.part.label}, a part: prove a cluster's coverage on the whole checkpoint"
        )


def _save(path: Path | None, shape: ClusterShape) -> None:
    if path is not None:
        try:
            path.write_text(shape_json(shape), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--save-plan {path} cannot be written: {error.strerror}") from None


def _report(
    checkpoint: Checkpoint, shape: ClusterShape | None, coverage: Coverage | None, deep: bool
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "directory": str(checkpoint.path),
        "num_parameters": checkpoint.num_parameters,
        "num_files": checkpoint.num_shards,
        "every_byte_read": deep,
    }
    if shape is not None and coverage is not None:
        report["shape"] = {
            "hosts": len(shape.units),
            "slices": shape.num_slices,
            "replicas": shape.num_replicas,
            **asdict(shape.partition),
        }
        report["num_ranges"] = coverage.num_ranges
        report["parameters_of"] = dict(coverage.elements_of)
    return report


def _fault(checkpoint: Checkpoint, fault: CoverageFault) -> dict[str, Any]:
    """State a fault with the file and the bytes of it, from the first to the last element; packed ones are bytes."""
    entry = checkpoint.entries[fault.tensor]
    if fault.tensor.endswith(PACKED):
        entry = as_bytes(entry)
    item_bytes, width = ITEM_BYTES[entry.dtype], entry.shape[-1]
    first = fault.rows.start * width + fault.columns.start
    last = (fault.rows.stop - 1) * width + fault.columns.stop
    return {
        "tensor": fault.tensor,
        "rows": [fault.rows.start, fault.rows.stop],
        "columns": [fault.columns.start, fault.columns.stop],
        "workers": fault.workers,
        "num_intended": fault.num_intended,
        "file": entry.file,
        "bytes": [entry.start + first * item_bytes, entry.start + last * item_bytes],
    }


def _show(report: dict[str, Any], coverage: Coverage | None) -> None:
    console.print(f"headers, index and config agree: {report['num_parameters']:,} parameters", highlight=False)
    for fault in report["faults"]:
        error_console.print("[bold red]coverage:[/]", end=" ")
        error_console.print(_words(fault), markup=False, highlight=False, soft_wrap=True)
    if coverage is not None and not report["faults"]:
        hosts, slices, replicas, stages, ranks = report["shape"].values()
        console.print(
            f"[green]every parameter is opened as often as meant[/] by {hosts} hosts, {slices} slices, "
            f"{replicas} replicas, {stages} stages of {ranks} ranks: "
            f"{coverage.num_ranges:,} ranges of {coverage.num_tensors:,} tensors",
            highlight=False,
        )
    if report["every_byte_read"]:
        console.print("[green]every byte read: hashes agree, no NaN, no Inf[/]")


def _words(fault: dict[str, Any]) -> str:
    workers = ", ".join(fault["workers"]) or "nobody"
    (top, bottom), (left, right), (start, stop) = fault["rows"], fault["columns"], fault["bytes"]
    return (
        f"{fault['tensor']} rows {top} to {bottom}, columns {left} to {right} "
        f"({fault['file']}, bytes {start} to {stop}) is opened by {workers}; {fault['num_intended']} are meant to"
    )
