"""Judges a recorded run against a fault-free one: nothing lost, nothing twice, every token right, and what it cost.

Exit status: 0 when every promise was kept, 1 when one was broken, 2 when a file cannot be read. Starts nothing, and
reads histories of earlier versions of the format.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama4_dist.chaos.history.events import HistoryError, read_history
from llama4_dist.chaos.history.reference import read_reference
from llama4_dist.chaos.history.stalls import Summary
from llama4_dist.chaos.history.verdict import Rules, Verdict, judge

MAX_SHOWN = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = parser().parse_args(arguments)
    rules = Rules(
        allowed_errors=frozenset(options.allow_error),
        required_phases=tuple(options.require_phase),
        max_added_stall_s=options.max_added_stall,
    )
    try:
        reference = None if options.without_reference else read_reference(options.reference)
        verdict = judge(read_history(options.history), reference, rules)
    except HistoryError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(verdict.as_json(), indent=2))
    else:
        show(verdict, Console(), is_compared=reference is not None)
    return 0 if verdict.has_passed else 1


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = described.add_argument
    add("history", nargs="+", type=Path, help="files of one run (one a client process)")
    source = described.add_mutually_exclusive_group(required=True)
    source.add_argument("--reference", type=Path, help="a fault-free history, or JSON {prompt and sampling: tokens}")
    source.add_argument("--without-reference", action="store_true", help="compare no tokens")
    add("--allow-error", action="append", default=[], metavar="REASON", help="errors with this reason are no violation")
    add("--require-phase", action="append", default=[], metavar="PHASE", help="some verified fault must fall into it")
    add("--max-added-stall", type=float, metavar="SECONDS", help="the most a fault may add to a gap between tokens")
    add("--json", action="store_true", help="print everything as JSON")
    return described


def show(verdict: Verdict, console: Console, *, is_compared: bool) -> None:
    """Print the verdict for people."""
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(verdict.outcomes.items())) or "none"
    compared = f"{verdict.num_compared} compared with the reference" if is_compared else "NOT compared with a reference"
    seeds = ", ".join(str(seed) for seed in verdict.seeds)
    console.print(f"requests: {ended}; {verdict.num_tokens} tokens, {compared}; seed {seeds}", highlight=False)
    console.print(waits(verdict))
    if verdict.faults:
        console.print(faults(verdict))
    for one in verdict.operations:
        took = "never ended" if one.seconds is None else f"{one.seconds:.3f} s"
        console.print(f"operation {one.number} {one.name}: {took}", highlight=False, markup=False)
    for violation in verdict.violations[:MAX_SHOWN]:
        line = f"{violation.kind} {violation.request_id} {violation.detail}"
        console.print(line, style="red", highlight=False, markup=False)
    if (num_hidden := len(verdict.violations) - MAX_SHOWN) > 0:
        console.print(f"and {num_hidden} more; --json lists all", style="red")
    result = "[green]kept every promise" if verdict.has_passed else f"[red]{len(verdict.violations)} violations"
    console.print(result)


def waits(verdict: Verdict) -> Table:
    """Tabulate the waits in milliseconds."""
    table = Table("milliseconds", "count", "p50", "p99", "max", title="Waits", title_justify="left")
    rows: dict[str, Summary] = {
        "first token": verdict.first_token,
        "gaps between tokens": verdict.gaps,
        "gaps without faults": verdict.healthy_gaps,
        "gaps under a fault": verdict.fault_gaps,
        "added by faults": verdict.added_stall,
    }
    for name, one in rows.items():
        table.add_row(name, str(one.count), *(f"{value * 1e3:.1f}" for value in (one.p50_s, one.p99_s, one.max_s)))
    return table


def faults(verdict: Verdict) -> Table:
    """Tabulate the faults by name and phase."""
    table = Table("fault", "phase", "count", "streams stalled", "worst recovery", "worst added stall", title="Faults")
    groups = sorted({(one.fault.name, one.fault.phase) for one in verdict.faults})
    for name, phase in groups:
        some = [one for one in verdict.faults if (one.fault.name, one.fault.phase) == (name, phase)]
        recovery_s, added_s = max(one.recovery_s for one in some), max(one.worst_added_s for one in some)
        stalled = str(sum(one.num_stalled for one in some))
        table.add_row(
            escape(name),
            escape(phase),
            str(len(some)),
            stalled,
            f"{recovery_s * 1e3:.1f} ms",
            f"{added_s * 1e3:.1f} ms",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
