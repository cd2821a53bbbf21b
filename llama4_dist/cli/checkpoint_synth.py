"""`llama4-dist checkpoint synth`: makes a synthetic checkpoint and shows what came out."""

import time
from dataclasses import asdict
from pathlib import Path

from llama4_dist.checkpoint.writing.synth import SynthReport, SynthRequest, synthesise
from llama4_dist.cli.output import human_bytes, print_json, print_pairs, reporting
from llama4_dist.cli.progress import byte_progress


def run_synth(request: SynthRequest, out: Path, as_json: bool) -> None:
    """Write the checkpoint; nothing is left of one that fails."""
    started = time.monotonic()
    with reporting(as_json), byte_progress("Writing", show=not as_json) as progress:
        report = synthesise(request, out, progress)
    seconds = time.monotonic() - started
    if as_json:
        print_json({**asdict(report), "geometry": report.origin.geometry, "seconds": round(seconds, 3)})
    else:
        print_pairs(str(out), _rows(report, seconds))


def _rows(report: SynthReport, seconds: float) -> dict[str, str]:
    config, origin = report.config, report.origin
    experts = f"{config.num_experts} × {config.expert_width}" if config.moe_layer_ids else "none"
    return {
        "geometry": f"{origin.geometry} (scale {origin.scale})",
        "weights": f"synthetic: {origin.weights}, seed {origin.seed}, {config.dtype}",
        "parameters": f"{report.num_parameters:,}",
        "layers": f"{config.num_layers}, {len(config.moe_layer_ids)} of them MoE",
        "width": f"{config.hidden_size}, dense {config.dense_width}, vocabulary {config.vocab_size}",
        "experts": experts,
        "heads": f"{config.num_heads} × {config.head_dim}, {config.num_kv_heads} KV",
        "files": f"{report.num_files}, {human_bytes(report.apparent_bytes)} long",
        "on disk": f"{human_bytes(report.allocated_bytes)}, {human_bytes(report.filled_bytes)} of weights written",
        "took": f"{seconds:.1f} s",
    }
