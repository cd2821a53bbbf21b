"""`llama4-dist checkpoint inspect DIR`: what a checkpoint is, holds and costs; reads headers only."""

from dataclasses import asdict
from pathlib import Path

from llama4_dist.checkpoint.describe import CheckpointSummary, describe
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.synthetic import Origin
from llama4_dist.cli.output import human_bytes, print_json, print_pairs, print_rows, reporting


def run_inspect(directory: Path, as_json: bool) -> None:
    """Describe the checkpoint."""
    with reporting(as_json):
        checkpoint = Checkpoint.open(directory)
        try:
            summary = describe(checkpoint)
        finally:
            checkpoint.close()
    if as_json:
        print_json({**asdict(summary), "is_sparse": summary.is_sparse, "unused": checkpoint.unused})
        return
    print_pairs(str(directory), summary_rows(summary))
    rows = [
        (kind, count, f"{count / summary.num_parameters:.2%}") for kind, count in summary.parameters_by_kind.items()
    ]
    print_rows("parameters", ["kind", "number", "share"], rows)


def summary_rows(summary: CheckpointSummary) -> dict[str, str]:
    """Put the numbers into words; serve's start-up table shows the same rows."""
    nope, chunked = summary.num_nope_layers, summary.num_chunked_layers
    rows = {} if summary.origin is None else {"synthetic": _origin(summary.origin)}
    if summary.part is not None:
        rows["part"] = f"{summary.part}, of a checkpoint of the hash below"
    rows |= {
        "architecture": f"{summary.architecture}, {summary.dtype}, {summary.layout} experts",
        "parameters": f"{summary.num_parameters:,}, {summary.num_active_parameters:,} active per token",
        "size": f"{human_bytes(summary.num_bytes)} in {summary.num_shards} files"
        + (f", sparse: {human_bytes(summary.allocated_bytes)} on the disk" if summary.is_sparse else ""),
        "layers": f"{summary.num_layers}: {summary.num_moe_layers} MoE, {nope} NoPE, {chunked} chunked"
        + (f" at {summary.chunk_size}" if chunked else ""),
        "experts": f"{summary.num_experts}, {summary.experts_per_token} per token, "
        f"{human_bytes(summary.expert_bytes)} each and layer"
        if summary.num_moe_layers
        else "none (dense)",
        "KV cache": f"{human_bytes(summary.kv_bytes_per_token)} per token, "
        f"{human_bytes(summary.kv_bytes_per_token_beyond_chunk)} beyond a chunk",
        "context": f"{summary.max_context:,} tokens",
        "model hash": summary.model_hash[:16],
    }
    if summary.quantisation is not None:
        rows["quantised"] = f"{summary.num_quantised:,} linears: {summary.quantisation}"
    if summary.num_unused_tensors:
        rows["not served"] = (
            f"{summary.num_unused_tensors} tensors, {human_bytes(summary.unused_bytes)} (vision or unknown)"
        )
    return rows


def _origin(origin: Origin) -> str:
    """Nobody may take what these weights compute for a model's words."""
    return f"{origin.geometry}, scale {origin.scale}; weights: {origin.weights}, seed {origin.seed}"
