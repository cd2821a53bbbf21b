"""`llama4-dist inspect DIR`: what a checkpoint is, holds and costs; reads headers only, unless told to verify."""

from dataclasses import asdict
from pathlib import Path

from llama4_dist.checkpoint.describe import CheckpointSummary, describe
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.cli.output import console, human_bytes, print_json, print_pairs, reporting
from llama4_dist.cli.progress import byte_progress


def run_inspect(directory: Path, verify: bool, as_json: bool) -> None:
    """Describe the checkpoint; with `verify` read every byte of it too."""
    with reporting(as_json):
        checkpoint = Checkpoint.open(directory)
        try:
            summary = describe(checkpoint)
            unused = checkpoint.unused
            if verify:
                with byte_progress("Verifying", show=not as_json) as progress:
                    checkpoint.verify(progress)
        finally:
            checkpoint.close()
    if as_json:
        print_json({**asdict(summary), "unused": unused, "verified": verify})
        return
    print_pairs(str(directory), summary_rows(summary))
    if verify:
        console.print("[green]every byte read: hashes agree, no NaN, no Inf[/]")


def summary_rows(summary: CheckpointSummary) -> dict[str, str]:
    """Put the numbers into words; serve's start-up table shows the same rows."""
    nope, chunked = summary.num_nope_layers, summary.num_chunked_layers
    rows = {
        "architecture": f"{summary.architecture}, {summary.dtype}, {summary.layout} experts",
        "parameters": f"{summary.num_parameters:,}, {summary.num_active_parameters:,} active per token",
        "size": f"{human_bytes(summary.num_bytes)} in {summary.num_shards} files",
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
