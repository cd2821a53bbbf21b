"""Measure how a step's time grows with sequences, context, experts and hosts, term by term, and fit the exponents.

Steps of the engine's core are timed, in this process and without a gateway. The terms are the core's own stations
(`llama4_dist.stations`) and the rest of the step; a term that is nothing at some size is shown, but not fitted.
A long context is reached without computing it: the engine takes the whole prompt through its own steps while a stand-in
for the model returns at once; then the model comes back and decodes against a cache that is full of zeros. Page tables,
chunks and the number of keys read are the real ones; only the values are not, and no time depends on those.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import plots
from benchmarks.checkpoint import ROOT, commit, write_checkpoint
from benchmarks.exponents import Growth, fit
from benchmarks.step_timer import STEP, Steps, engine_steps
from llama4_dist.engine.options import EngineOptions

CONTEXT = "positions cached"
MAY_GROW_FASTER = {STEP, "attention"}  # by context, where attention's own work may be more than linear, and so the sum
MAX_OTHERS = 0.3  # share of the processors; beyond it times say nothing
# For experts and hosts: many small experts, so that the work of reaching them shows.
SMALL = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One size that grows, and the median time of every term at each of its values, in seconds."""

    name: str
    unit: str
    setting: str
    batch: int | None  # sequences in a step; None where the size is just that
    sizes: list[int] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)  # what other processes had of the processors meanwhile

    def add(self, size: int, steps: Steps, *, sequences: int, context: int, num_steps: int) -> None:
        """Measure one size."""
        seconds, others = steps.decode(sequences, context, num_steps)
        self.sizes.append(size)
        self.others.append(others)
        for term, value in seconds.items():
            self.terms.setdefault(term, []).append(value)

    def growth(self) -> dict[str, Growth]:
        return {term: fit(self.sizes, values) for term, values in self.terms.items() if min(values) > 0}


def by_sequences(model_dir: Path, arguments: argparse.Namespace) -> Axis:
    axis = Axis(name="sequences", unit="sequences", setting="346M, 16 experts, 64 positions cached each", batch=None)
    options = EngineOptions(kv_cache_bytes=1 << 29, max_num_seqs=max(arguments.sequences), max_waiting=1024)
    with engine_steps(model_dir, options, num_threads=arguments.threads) as steps:
        for number in arguments.sequences:
            axis.add(number, steps, sequences=number, context=64, num_steps=arguments.steps)
    return axis


def by_context(model_dir: Path, contexts: Sequence[int], label: str, arguments: argparse.Namespace) -> Axis:
    axis = Axis(name=f"context-{label}", unit=CONTEXT, setting=f"{label}, one sequence", batch=1)
    options = EngineOptions(kv_cache_bytes=9 << 28, max_num_seqs=1)
    with engine_steps(model_dir, options, num_threads=arguments.threads) as steps:
        for context in contexts:
            axis.add(context, steps, sequences=1, context=context, num_steps=arguments.steps)
    return axis


def by_experts(folder: Path, arguments: argparse.Namespace) -> Axis:
    setting = f"small experts, batch {BATCH}, one host"
    axis = Axis(name="experts", unit="experts", setting=setting, batch=BATCH)
    for number in arguments.experts:
        model_dir = write_checkpoint(folder / f"experts-{number}", "float32", num_local_experts=number, **SMALL)
        with engine_steps(model_dir, small_options(), num_threads=arguments.threads) as steps:
            axis.add(number, steps, sequences=BATCH, context=64, num_steps=arguments.steps)
    return axis


def by_hosts(folder: Path, arguments: argparse.Namespace) -> Axis:
    axis = Axis(name="hosts", unit="hosts in this process", setting=f"16 small experts, batch {BATCH}", batch=BATCH)
    model_dir = write_checkpoint(folder / "hosts", "float32", **SMALL)
    for number in arguments.hosts:
        with engine_steps(model_dir, small_options(), num_hosts=number, num_threads=arguments.threads) as steps:
            axis.add(number, steps, sequences=BATCH, context=64, num_steps=arguments.steps)
    return axis


def small_options() -> EngineOptions:
    return EngineOptions(kv_cache_bytes=256 << 20, max_num_seqs=BATCH)


def report(axes: Sequence[Axis]) -> list[str]:
    """Print each axis and return the terms that grow faster than they may."""
    console = Console(width=170)
    too_fast = []
    for axis in axes:
        table = Table(axis.unit, *axis.terms, "tokens/s", title=axis.setting)
        for index, size in enumerate(axis.sizes):
            cells = [f"{1000 * values[index]:.2f}" for values in axis.terms.values()]
            table.add_row(f"{size:,}", *cells, f"{(axis.batch or size) / axis.terms[STEP][index]:,.1f}")
        growth = axis.growth()
        table.add_section()
        table.add_row("exponent", *(str(growth.get(term, "")) for term in axis.terms))
        others = f"other processes had {max(axis.others):.0%} of the processors at most"
        console.print(table, f"milliseconds; exponents over the upper half of the {axis.unit}; {others}\n")
        for term, found in growth.items():
            may = term in MAY_GROW_FASTER and axis.unit == CONTEXT
            if found.is_super_linear and not may:
                too_fast.append(f"{term} by {axis.name}: {found}")
    return too_fast


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="timed at each size; their median counts")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1 << power for power in range(10, 18)])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 24, 32, 48, 64, 96, 128])
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--model", type=Path, help="a checkpoint of the comparisons' geometry; a new one by default")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "growth", help="folder for one SVG an axis")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llama4-growth-") as name:
        folder = Path(name)
        model_dir = arguments.model or write_checkpoint(folder / "model", "float32")
        mini = ROOT / "models" / "llama4-mini"
        axes = [
            by_sequences(model_dir, arguments),
            by_context(model_dir, arguments.contexts, "346M", arguments),
            by_context(mini, [32, 64, 128, 256, 512, 960], "llama4-mini", arguments),
            by_experts(folder, arguments),
            by_hosts(folder, arguments),
        ]
    too_fast = report(axes)
    disturbed = max(share for axis in axes for share in axis.others)
    if disturbed > MAX_OTHERS:
        sys.exit(f"other processes had {disturbed:.0%} of the processors: no verdict, no plots; run again when quiet")
    verdict = "no term but attention's own grows more than linearly"
    print(f"MORE THAN LINEAR: {'; '.join(too_fast)}" if too_fast else verdict)
    for axis in axes:
        labels = {term: f"{term} ({found.exponent:.2f})" for term, found in axis.growth().items()}
        plots.lines(
            arguments.plots / f"{axis.name}.svg",
            axis.sizes,
            {term: axis.terms[term] for term in labels},
            labels,
            (axis.unit, axis.setting),
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures(axes, arguments), indent=2, default=str) + "\n")
    return 1 if too_fast else 0


def figures(axes: Sequence[Axis], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `--json` writes."""
    return {
        "benchmark": "growth",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "settings": vars(arguments),
        "axes": [
            {
                "name": axis.name,
                "setting": axis.setting,
                "sizes": axis.sizes,
                "seconds": axis.terms,
                "others": axis.others,
                "exponents": {term: [found.exponent, found.error] for term, found in axis.growth().items()},
            }
            for axis in axes
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
