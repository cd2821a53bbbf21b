"""Kills and stops expert hosts of a real Ray cluster at chosen moments under load, and measures what streams notice.

Hosts are told beforehand at which of their fault points to die (receiving, computing, half a reply sent), or are
killed by signal while nothing runs, while the cluster grows, while it shrinks, and before the first request. Each
blow waits for the cluster to be whole again. Every token is compared with those of one process. Exit code 1 when a
request was lost or a token wrong.
"""

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engine_load import Load
from cluster.ray_engine import RayEngine
from cluster.worker import Role, State, WorkerStatus
from llama4_dist.chaos.cases import answers_of, make_cases, prompts_of
from llama4_dist.chaos.history import EventKind, History, read_history
from llama4_dist.chaos.history.stalls import Gap, Summary, gaps_of, summary
from llama4_dist.chaos.history.verdict import Rules, Verdict, judge
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import Llama4Error

ROOT = Path(__file__).parents[1]
POINTS = ("receiving", "computing", "half_reply", "replied")
MOMENTS = (*POINTS, "idle", "scale-up", "drain")
WHOLE_TIMEOUT_S = 120.0
EFFECT_S = 3.0  # a gap that begins so soon after a blow is the blow's


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One host struck: when (monotonic), at which moment, and whether another host held its experts."""

    at_s: float
    moment: str
    action: str
    replicated: bool


class Striker:
    """Strikes one cluster."""

    def __init__(
        self, engine: RayEngine, history: History, load: Load, *, seed: int, num_hosts: int, replicas: int
    ) -> None:
        self._engine = engine
        self._history = history
        self._load = load
        self._draw = random.Random(seed)
        self._num_hosts = num_hosts
        self._replicated = replicas > 1
        self.blows: list[Blow] = []

    def strike(self, moment: str, action: str) -> None:
        """One blow, seen through until the cluster is whole again."""
        hosts = self.wait_until_whole()
        victim = self._draw.choice(hosts)
        if moment in POINTS:
            self._engine.arm(victim.worker, moment, after=self._draw.randint(1, 40), action=action)
            if not has_struck(victim.pid, action, 20.0):
                self._engine.arm(victim.worker, "")
                return  # no row came its way
        elif moment == "idle":
            self._load.pause()
            send(victim.pid, action)
        elif moment == "before the first request":
            send(victim.pid, action)
        else:
            grows = moment == "scale-up"
            self._engine.control.scale(self._num_hosts + 1 if grows else max(1, self._num_hosts - 1))
            time.sleep(self._draw.uniform(0.0, 3.0 if grows else 0.15))  # anywhere in the operation
            send(victim.pid, action)
        self._note(moment, action)
        if moment == "idle":
            self._load.resume()
        if action == "stop":
            time.sleep(self._draw.choice((0.5, 1.5, 3.0)))
            send(victim.pid, "continue")
        if moment in ("scale-up", "drain"):
            self._scale_back()

    def wait_until_whole(self) -> list[WorkerStatus]:
        """Wait until every host serves and no operation runs; return the hosts."""
        deadline_s = time.monotonic() + WHOLE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            view = self._engine.control.view()
            hosts = [one for one in view.workers if one.role is Role.EXPERT]
            held = all(one.experts for one in hosts)
            if (
                not view.operation
                and held
                and len(hosts) == self._num_hosts
                and all(h.state is State.READY for h in hosts)
            ):
                time.sleep(0.3)  # a moment of peace, to tell one blow's gap from the next
                return hosts
            time.sleep(0.1)
        raise SystemExit(f"the cluster is not whole after {WHOLE_TIMEOUT_S} s: {self._engine.control.view()}")

    def _scale_back(self) -> None:
        deadline_s = time.monotonic() + WHOLE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                name = self._engine.control.scale(self._num_hosts).name
            except Llama4Error:  # the operation struck, or a repair, still runs
                time.sleep(0.2)
                continue
            while not self._engine.control.operation(name).phase.final:
                time.sleep(0.1)
            return

    def _note(self, moment: str, action: str) -> None:
        extra = {"number": self._history.next_number(), "name": f"{action} expert", "phase": moment}
        for kind in (EventKind.FAULT_INJECTED, EventKind.FAULT_VERIFIED, EventKind.FAULT_HEALED):
            self._history.record(kind, extra=extra)
        self.blows.append(Blow(at_s=time.monotonic(), moment=moment, action=action, replicated=self._replicated))


def send(pid: int, action: str) -> None:
    """Send the signal of an action."""
    os.kill(pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}[action])


def has_struck(pid: int, action: str, timeout_s: float) -> bool:
    """Wait until a process is dead or stopped."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            state = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return True
        if state in ((psutil.STATUS_STOPPED,) if action == "stop" else (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)):
            return True
        time.sleep(0.001)
    return False


@contextmanager
def cluster(options: argparse.Namespace, replicas: int) -> Iterator[RayEngine]:
    """A cluster whose hosts can be armed."""
    engine = RayEngine(
        options.model,
        num_expert_hosts=options.experts,
        num_attention_workers=1,
        num_replicas=replicas,
        dtype="float32",
        options=EngineOptions(max_num_seqs=16),
        armable=True,
    )
    try:
        yield engine
    finally:
        engine.close()


def run(options: argparse.Namespace, file: Path, progress: Progress) -> tuple[Verdict, list[Blow]]:
    """Strike a cluster with two copies of everything, then one with a single copy."""
    cases = make_cases(prompts_of(options.model), max_tokens=48)
    reference = answers_of(options.model, cases, dtype="float32")
    blows: list[Blow] = []
    plans = {2: schedule(options.kills, options.stops), 1: schedule(options.kills_alone, 0)}
    task = progress.add_task("blows", total=sum(map(len, plans.values())))
    with History(file, seed=options.seed) as history:
        for replicas, plan in plans.items():
            if not plan:
                continue
            with cluster(options, replicas) as engine:
                load = Load(engine, history, cases, options.streams, prefix=f"copies-{replicas}")
                striker = Striker(
                    engine, history, load, seed=options.seed + replicas, num_hosts=options.experts, replicas=replicas
                )
                load.begin()
                striker.strike("before the first request", "kill")
                load.resume()
                striker.wait_until_whole()
                time.sleep(options.quiet)
                for moment, action in plan:
                    striker.strike(moment, action)
                    progress.advance(task)
                striker.wait_until_whole()
                load.pause()
                blows += striker.blows
    return judge(read_history([file]), reference, Rules()), blows


def schedule(num_kills: int, num_stops: int) -> list[tuple[str, str]]:
    """Spread kills over all moments, stops over those in which rows are under way."""
    kills = [(moment, "kill") for moment in itertools.islice(itertools.cycle(MOMENTS), num_kills)]
    stops = [(moment, "stop") for moment in itertools.islice(itertools.cycle(POINTS), num_stops)]
    return kills + stops


def added_by(blows: Sequence[Blow], gaps: Sequence[Gap], usual_s: float) -> Mapping[tuple[str, str], Summary]:
    """Return, for each (kind of blow, moment), the longest gap each blow made beyond what is usual."""
    added: dict[tuple[str, str], list[float]] = defaultdict(list)
    for blow in blows:
        kind = f"{blow.action}, {'replica' if blow.replicated else 'no replica'}"
        hit = [gap.length_s for gap in gaps if gap.begin_s <= blow.at_s + EFFECT_S and gap.end_s >= blow.at_s - 0.05]
        if hit:
            stall_s = max(0.0, max(hit) - usual_s)
            added[kind, blow.moment].append(stall_s)
            added[kind, "all"].append(stall_s)
    return {key: summary(values) for key, values in added.items()}


def main() -> int:
    """Run, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "llama4-mini")
    parser.add_argument("--kills", type=int, default=84, help="with two copies of every expert")
    parser.add_argument("--kills-alone", type=int, default=21, help="with one copy")
    parser.add_argument("--stops", type=int, default=12)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--quiet", type=float, default=5.0, help="seconds without blows, the measure of what is usual")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--history", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        file = options.history or Path(folder) / "history.jsonl"
        verdict, blows = run(options, file, progress)
        gaps = gaps_of(read_history([file]))
    quiet = [gap.length_s for gap in gaps if not any(-0.1 < gap.end_s - blow.at_s < EFFECT_S for blow in blows)]
    usual_s = summary(quiet).p99_s
    added = added_by(blows, gaps, usual_s)
    if options.json:
        rows = [{"blow": kind, "moment": moment} | asdict(one) for (kind, moment), one in added.items()]
        print(json.dumps({"passed": verdict.has_passed, "blows": len(blows), "usual_p99_s": usual_s, "added": rows}))
    else:
        show(console, verdict, blows, added, usual_s)
    return 0 if verdict.has_passed and verdict.num_compared else 1


def show(
    console: Console, verdict: Verdict, blows: Sequence[Blow], added: Mapping[tuple[str, str], Summary], usual_s: float
) -> None:
    """Print for people."""
    title = f"Longest gap a blow adds, ms; usual p99 {1000 * usual_s:.0f} ms"
    table = Table("blow", "moment", "count", "p50", "p99", "max", title=title, title_justify="left")
    for (kind, moment), one in sorted(added.items()):
        table.add_row(kind, moment, str(one.count), *(f"{1000 * v:.0f}" for v in (one.p50_s, one.p99_s, one.max_s)))
    console.print(table)
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(verdict.outcomes.items()))
    console.print(
        f"{len(blows)} blows; requests: {ended}; {verdict.num_compared} compared, {verdict.num_tokens} tokens"
    )
    for violation in verdict.violations[:20]:
        console.print(f"[red]{violation.kind}[/] {violation.request_id} {violation.detail}")
    console.print("[green]nothing lost, every token right" if verdict.has_passed else "[red]promises were broken")


if __name__ == "__main__":
    sys.exit(main())
