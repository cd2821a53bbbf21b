"""Decode throughput of a cluster on this machine against one process, at one batch size, on the same random checkpoint.

Both are loaded before anything is measured and take turns, so that drift of the machine falls on both; the medians of
the rounds count. Prefill is left out: the clock starts when the last sequence has its first token. Other engines are
compared in `benchmarks.compare`. Acceptance: cluster >= 0.8 x one process.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint import GEOMETRY, write_checkpoint
from benchmarks.engine_timer import EngineTimer
from benchmarks.workloads import Speed, decode
from cluster.ray_engine import RayEngine
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions

SINGLE, CLUSTER = "one process", "cluster"
FLOOR = 0.8


def measure(contenders: Mapping[str, EngineTimer], arguments: argparse.Namespace) -> dict[str, Speed]:
    """Warm both up once, then let them take turns."""
    workload = decode(arguments.batch, arguments.tokens)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(arguments.rounds + 1):
        prompts = workload.prompts(index, GEOMETRY["vocab_size"])
        for name, engine in contenders.items():
            timed = engine.decode(prompts, arguments.tokens)
            if index:  # the first round warms up
                rates[name].append(timed.rate)
    return {name: Speed(rounds=tuple(of_one)) for name, of_one in rates.items()}


def compare(arguments: argparse.Namespace, model_dir: Path) -> dict[str, Speed]:
    """Run a cluster and one process on the same cores."""
    options = EngineOptions(
        kv_cache_bytes=256 << 20, max_num_seqs=max(16, arguments.batch), num_microbatches=arguments.microbatches
    )
    with ExitStack() as resources:
        cluster = RayEngine(
            model_dir,
            num_expert_hosts=arguments.experts,
            options=options,
            num_threads=arguments.attention_threads,
            expert_threads=arguments.expert_threads,
        )
        resources.callback(cluster.close)
        single = build_single_process(model_dir, options=options, num_threads=arguments.threads)
        resources.callback(single.close)
        return measure({CLUSTER: EngineTimer(cluster), SINGLE: EngineTimer(single)}, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, choices=(1, 2), help="chosen by the engine, if left out")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="per sequence and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--experts", type=int, default=2, help="expert hosts of the cluster")
    parser.add_argument("--threads", type=int, default=2, help="of the single process")
    parser.add_argument("--attention-threads", type=int, help="default: the cluster's own")
    parser.add_argument("--expert-threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # this thread only prepares; the engine's has its own setting
    with tempfile.TemporaryDirectory(prefix="llama4-bench-") as folder:
        speeds = compare(arguments, write_checkpoint(Path(folder), arguments.dtype))
    ratio = speeds[CLUSTER].median / speeds[SINGLE].median
    verdict = f"{ratio:.2f}, {FLOOR:g} {'met' if ratio >= FLOOR else 'MISSED'}"
    title = f"decode, batch {arguments.batch}, {arguments.dtype}: tokens per second, median (least–most)"
    table = Table(*speeds, "ratio", title=title)
    table.add_row(*map(str, speeds.values()), verdict)
    Console(width=120).print(table)
    if arguments.json is not None:
        figures = {"settings": vars(arguments), "ratio": ratio, "rounds": {n: s.rounds for n, s in speeds.items()}}
        arguments.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
