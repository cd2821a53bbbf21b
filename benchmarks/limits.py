"""Say which share of the machine's limits decode and prefill reach, the limits being measured in the same run.

Decode of one sequence must read every weight its token meets: active bytes x tokens per second is held against the
bandwidth of reading memory. Prefill of a prompt must multiply: operations x prompts per second is held against the best
float32 matrix product. The four take turns. Each limit is the best of its rounds, what is held against it the median.
A part of the active weights may stay in a large cache between two tokens; that read is faster than memory, so the
bandwidth over a buffer of just the active bytes is shown too.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.active import decode_bytes, prefill_operations
from benchmarks.checkpoint import commit, write_checkpoint
from benchmarks.contenders.process import Contender
from benchmarks.machine import Memory, Products
from benchmarks.quiet import undisturbed
from benchmarks.workloads import decode, prefill
from llama4_dist.checkpoint.config_file import read_config
from llama4_dist.config import ModelConfig

SHARE = 0.6  # what decode of one sequence and prefill shall reach at least
MEMORY, MEMORY_TORCH, ACTIVE, PRODUCTS = "memory", "memory, torch.sum", "active bytes only", "product"
DECODE, PREFILL = "decode 1", "prefill"

Rounds = dict[str, list[float]]


def measure(arguments: argparse.Namespace, folder: Path, model_dir: Path, config: ModelConfig) -> Rounds:
    """Let the limits and the engine take turns; return bytes, operations and tokens per second of every round."""
    torch.set_num_threads(arguments.threads)
    memory = Memory(folder, arguments.threads)
    active = Memory(folder, arguments.threads, decode_bytes(config) // 4096 * 4096)
    products = Products()
    engine = Contender(
        "one process",
        "engine",
        [str(model_dir), str(arguments.threads), "1"],
        log=folder / "engine.log",
        threads=arguments.threads,
    )
    workloads = {DECODE: decode(1, arguments.tokens), PREFILL: prefill(arguments.prompt)}
    rounds: Rounds = defaultdict(list)
    try:
        for index in range(arguments.rounds + 1):
            found = {}
            for name, rate in {MEMORY: memory.native, MEMORY_TORCH: memory.torch, ACTIVE: active.native}.items():
                found[name], _ = undisturbed(rate, (os.getpid(),))
            found |= undisturbed(products.rates, (os.getpid(),))[0]
            for name, workload in workloads.items():
                prompts = workload.prompts(index, config.vocab_size)
                timed, _ = undisturbed(partial(engine.ask, prompts, workload.num_tokens), (engine.pid, os.getpid()))
                found[name] = timed.rate
            for name, reached in found.items() if index else ():  # the first round warms up
                rounds[name].append(reached)
    finally:
        engine.close()
    return rounds


def shares(rounds: Rounds, config: ModelConfig, num_prompt_tokens: int) -> dict[str, float]:
    """Return the figures that the table shows, from the rounds."""
    bandwidth = max(rounds[MEMORY])
    peak = max(max(rates) for name, rates in rounds.items() if name.split()[0] in ("torch.mm", "oneDNN"))
    read = decode_bytes(config) * statistics.median(rounds[DECODE])
    computed = prefill_operations(config, num_prompt_tokens) / num_prompt_tokens * statistics.median(rounds[PREFILL])
    return {
        "bandwidth": bandwidth,
        "bandwidth_torch": max(rounds[MEMORY_TORCH]),
        "bandwidth_active_bytes": max(rounds[ACTIVE]),
        "peak": peak,
        "active_bytes": decode_bytes(config),
        "decode_tokens_per_second": statistics.median(rounds[DECODE]),
        "decode_share": read / bandwidth,
        "prefill_operations": prefill_operations(config, num_prompt_tokens),
        "prefill_tokens_per_second": statistics.median(rounds[PREFILL]),
        "prefill_share": computed / peak,
    }


def report(found: dict[str, float], title: str) -> None:
    table = Table("what", "measured", "limit", "share", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("read memory, C++", f"{found['bandwidth'] / 1e9:.1f} GB/s", "", "")
    table.add_row("read memory, torch.sum", f"{found['bandwidth_torch'] / 1e9:.1f} GB/s", "", "")
    table.add_row("read a buffer of the active bytes", f"{found['bandwidth_active_bytes'] / 1e9:.1f} GB/s", "", "")
    table.add_row("float32 product", f"{found['peak'] / 1e9:.0f} GFLOP/s", "", "")
    table.add_section()
    rates = (found["decode_tokens_per_second"], found["prefill_tokens_per_second"])
    table.add_row(f"active weights: {found['active_bytes'] / 1e6:.1f} MB a token", f"{rates[0]:.1f} tokens/s", "", "")
    bandwidth = found["active_bytes"] * rates[0]
    table.add_row(
        "decode, one sequence",
        f"{bandwidth / 1e9:.1f} GB/s",
        f"{found['bandwidth'] / 1e9:.1f} GB/s",
        judged(found["decode_share"]),
    )
    table.add_row(f"prompt: {found['prefill_operations'] / 1e9:.1f} GFLOP", f"{rates[1]:.0f} tokens/s", "", "")
    computed = found["prefill_share"] * found["peak"]
    table.add_row(
        "prefill",
        f"{computed / 1e9:.0f} GFLOP/s",
        f"{found['peak'] / 1e9:.0f} GFLOP/s",
        judged(found["prefill_share"]),
    )
    Console(width=120).print(table)


def judged(share: float) -> str:
    return f"{share:.0%} ({SHARE:.0%} {'met' if share >= SHARE else 'MISSED'})"


def main() -> None:
    # A stopped child would outlive us: whoever ends this run ends it too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48, help="of the decode")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default a new one of the comparisons' geometry")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="llama4-limits-")))
        model_dir = arguments.model or write_checkpoint(folder / "model", arguments.dtype)
        config = read_config(model_dir)
        rounds = measure(arguments, folder, model_dir, config)
    found = shares(rounds, config, arguments.prompt)
    report(found, f"{config.dtype}, {arguments.threads} threads, {arguments.rounds} rounds, commit {commit()}")
    if arguments.json:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        head = {"benchmark": "limits", "at": at, "commit": commit(), "settings": vars(arguments)}
        arguments.json.write_text(json.dumps(head | {"figures": found, "rounds": rounds}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
