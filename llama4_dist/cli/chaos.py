"""`llama4-dist chaos`: breaks a cluster of its own under load and prints what its clients noticed."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llama4_dist.chaos.history.stalls import Summary
from llama4_dist.chaos.run import ChaosOptions, ChaosResult, run_chaos
from llama4_dist.chaos.run import Progress as Going
from llama4_dist.chaos.schedule import ChaosPlan
from llama4_dist.cli.output import console, print_json, reporting
from llama4_dist.errors import ConfigError

MAX_SHOWN = 20


def run_chaos_command(
    options: ChaosOptions, plan_of: Callable[[], ChaosPlan], history: Path | None, as_json: bool
) -> None:
    """Run, report, and exit with 1 when anything was lost or wrong."""
    with reporting(as_json), tempfile.TemporaryDirectory(prefix="llama4-chaos-") as folder:
        try:
            plan = plan_of()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        file = history or Path(folder) / "history.jsonl"
        if file.exists():
            raise ConfigError(f"{file} exists: a history is written once, name another file")
        with shown(plan, quiet=as_json) as on_progress:
            result = run_chaos(options, plan, file, on_progress=on_progress)
        if as_json:
            print_json(
                {
                    "passed": result.has_passed,
                    "blows": result.num_struck,
                    "skipped": result.num_skipped,
                    "kv_usage": result.kv_usage,
                    "ended_in_time": result.ended_in_time,
                    **result.verdict.as_json(),
                }
            )
        else:
            show(result, plan)
    if not result.has_passed:
        sys.exit(1)


def parse_hosts(given: str) -> tuple[int, ...]:
    """Read sizes as `6,3,4`."""
    try:
        return tuple(int(size) for size in given.split(","))
    except ValueError:
        raise ConfigError(f"hosts={given!r}: give sizes as 6,3,4") from None


@contextmanager
def shown(plan: ChaosPlan, *, quiet: bool) -> Iterator[Callable[[Going], None]]:
    """Show a bar with counts while the run goes."""
    if quiet:
        yield lambda going: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=plan.duration_s)

        def update(going: Going) -> None:
            told = f"{going.num_done} requests, {going.num_tokens} tokens, {going.num_struck} blows"
            failed = f", [red]{going.num_failed} failed[/]" if going.num_failed else ""
            bar.update(task, completed=going.elapsed_s, description=told + failed)

        yield update


def show(result: ChaosResult, plan: ChaosPlan) -> None:
    """Print the verdict for people."""
    verdict = result.verdict
    requests = Table("outcome", "requests", title="Requests", title_justify="left")
    for outcome, count in sorted(verdict.outcomes.items()):
        requests.add_row(outcome, f"{count:,}")
    requests.add_row("compared with a run without faults", f"{verdict.num_compared:,}")
    console.print(requests)
    waits = Table("milliseconds", "count", "p50", "p99", "max", title="Stalls", title_justify="left")
    rows: dict[str, Summary] = {
        "gaps between tokens": verdict.gaps,
        "gaps without a fault": verdict.healthy_gaps,
        "gaps under a fault": verdict.fault_gaps,
        "added by faults": verdict.added_stall,
    }
    for name, one in rows.items():
        waits.add_row(name, f"{one.count:,}", *(f"{1000 * value:.1f}" for value in (one.p50_s, one.p99_s, one.max_s)))
    console.print(waits)
    faults = Table("fault", "while", "count", "whole again after", title="Faults", title_justify="left")
    for name, phase in sorted({(one.fault.name, one.fault.phase) for one in verdict.faults}):
        some = [one for one in verdict.faults if (one.fault.name, one.fault.phase) == (name, phase)]
        longest_s = max(one.fault.healed_s - one.fault.injected_s for one in some)
        faults.add_row(name, phase, str(len(some)), f"{longest_s:.1f} s at most")
    console.print(faults)
    if result.kv_usage:
        console.print(f"[red]{result.kv_usage:.1%} of the KV cache is held although nothing runs[/]")
    for operation in verdict.operations:
        took = "never ended" if operation.seconds is None else f"{operation.seconds:.1f} s"
        console.print(f"{operation.name}: {took}", markup=False, highlight=False)
    for violation in verdict.violations[:MAX_SHOWN]:
        line = f"{violation.kind} {violation.request_id} {violation.detail}"
        console.print(line, style="red", markup=False, highlight=False)
    outcome = "[green]nothing lost, every token right[/]" if result.has_passed else "[red]promises were broken[/]"
    console.print(f"{outcome} (seed {plan.seed})")
