"""Scales the expert pool of a real Ray cluster 2 → 4 → 3 → 1 → 4 under load and measures what streams notice of it.

On two cores, processes that start take the cores from those that serve; that is the machine, not the method. So as many
processes are also started beside the cluster, without being part of it, and the gaps under that are given too. Steady
state, control and scaling are windows of one run. Exit code 1 when a request was refused or lost, or a token wrong.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.engine_load import Load
from cluster.ray_engine import RayEngine
from llama4_dist.chaos.cases import answers_of, make_cases, prompts_of
from llama4_dist.chaos.history import History, read_history
from llama4_dist.chaos.history.stalls import Gap, Summary, gaps_of, summary
from llama4_dist.chaos.history.verdict import Rules, Verdict, judge
from llama4_dist.engine.options import EngineOptions

ROOT = Path(__file__).parents[1]
SIZES = (4, 3, 1, 4)
TIMEOUT_S = 300.0
# What a host does until it serves, and nothing more: imports, and the weights mapped and read once.
CONTROL = """
import sys, torch
from pathlib import Path
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.expert_store import ExpertStore
torch.set_num_threads(1)
checkpoint = Checkpoint.open(Path(sys.argv[1]))
store = ExpertStore(checkpoint, dtype=torch.float32, device="cpu")
config = checkpoint.config
pairs = [(layer, expert) for layer in config.moe_layer_ids for expert in range(config.num_experts)][::2]
store.add(pairs)
for pair in pairs:
    store.fingerprint(pair)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of the run, in monotonic seconds; `moved_ms` is how long no step could run."""

    name: str
    begin_s: float
    end_s: float
    phases: tuple[tuple[str, float], ...] = ()
    paused_ms: float = 0.0
    memory: str = ""


def run(options: argparse.Namespace, file: Path) -> tuple[Verdict, list[Window]]:
    """Serve, load, and scale."""
    cases = make_cases(prompts_of(options.model), max_tokens=options.max_tokens)
    reference = answers_of(options.model, cases, dtype="float32")
    engine = RayEngine(options.model, num_expert_hosts=2, dtype="float32", options=EngineOptions(max_num_seqs=16))
    windows: list[Window] = []
    try:
        with History(file, seed=0) as history:
            load = Load(engine, history, cases, options.streams, prefix="scale")
            load.begin()
            load.resume()
            time.sleep(3.0)  # first rows touch cold pages
            windows.append(quiet("steady", options.quiet))
            windows.append(control(options.model, 2))
            for size in SIZES:
                windows.append(scale(engine, size))
                windows.append(quiet(f"after {size}", options.quiet / 2))
            windows.append(Window(name="all scaling", begin_s=windows[2].begin_s, end_s=windows[-1].end_s))
            load.pause()
    finally:
        engine.close()
    return judge(read_history([file]), reference, Rules()), windows


def quiet(name: str, seconds: float) -> Window:
    """Nothing happens."""
    begin_s = time.monotonic()
    time.sleep(seconds)
    return Window(name=name, begin_s=begin_s, end_s=time.monotonic())


def control(model: Path, num_processes: int) -> Window:
    """Processes start and load as hosts do, and nobody has anything to do with them."""
    begin_s = time.monotonic()
    command = [sys.executable, "-c", CONTROL, str(model)]
    for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(num_processes)]:
        process.wait()
    return Window(name=f"control: {num_processes} processes start beside", begin_s=begin_s, end_s=time.monotonic())


def scale(engine: RayEngine, num_hosts: int) -> Window:
    """One change of size, phase by phase."""
    before = memory(engine)
    begin_s = time.monotonic()
    operation = engine.control.scale(num_hosts)
    name = f"{operation.change.hosts_before if operation.change else '?'} → {num_hosts}"
    phases: list[tuple[str, float]] = []
    while True:
        operation = engine.control.operation(operation.name)
        if not phases or phases[-1][0] != operation.phase:
            phases.append((str(operation.phase), time.monotonic()))
        if operation.phase.final:
            break
        if time.monotonic() - begin_s > TIMEOUT_S:
            raise SystemExit(f"{operation.name} is still {operation.phase}")
        time.sleep(0.02)
    if operation.error_message:
        raise SystemExit(f"{operation.name}: {operation.error_message}")
    after = memory(engine)
    kept = [f"{host} {before[host] >> 20} → {after[host] >> 20}" for host in sorted(before) if host in after]
    gone = [f"{host} {before[host] >> 20} → 0" for host in sorted(before) if host not in after]
    return Window(
        name=name,
        begin_s=begin_s,
        end_s=time.monotonic(),
        phases=tuple(phases),
        paused_ms=1000 * operation.paused_s,
        memory=", ".join([*kept, *gone]),
    )


def memory(engine: RayEngine) -> dict[str, int]:
    """Bytes of experts each host holds."""
    return {load.host: load.bytes_held for load in engine.control.loads()}


def within(gaps: Sequence[Gap], window: Window) -> Summary:
    """Summarise the gaps that end in a window."""
    return summary(gap.length_s for gap in gaps if window.begin_s <= gap.end_s <= window.end_s)


def main() -> int:
    """Run, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "llama4-mini")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds of steady state")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "history.jsonl"
        verdict, windows = run(options, file)
        gaps = gaps_of(read_history([file]))
    usual = within(gaps, windows[0])
    rows = [(window, within(gaps, window)) for window in windows]
    if options.json:
        told = [asdict(window) | {"gaps": asdict(found)} for window, found in rows]
        print(json.dumps({"passed": verdict.has_passed, "outcomes": dict(verdict.outcomes), "windows": told}))
        return 0 if verdict.has_passed else 1
    console = Console()
    table = Table(
        "window", "seconds", "p50 ms", "p99 ms", "of steady", "longest ms", "paused ms", title="Gaps between tokens"
    )
    for window, found in rows:
        ratio = found.p99_s / usual.p99_s if usual.p99_s else 0.0
        times = (f"{1000 * value:.1f}" for value in (found.p50_s, found.p99_s))
        paused = f"{window.paused_ms:.2f}" if window.phases else ""
        seconds = f"{window.end_s - window.begin_s:.1f}"
        table.add_row(window.name, seconds, *times, f"{ratio:.2f}", f"{1000 * found.max_s:.0f}", paused)
    console.print(table)
    for window, _ in rows:
        if window.memory:
            console.print(f"{window.name}: MiB of experts held: {window.memory}", highlight=False)
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(verdict.outcomes.items()))
    console.print(f"requests: {ended}; {verdict.num_compared} compared")
    return 0 if verdict.has_passed and verdict.num_compared else 1


if __name__ == "__main__":
    sys.exit(main())
