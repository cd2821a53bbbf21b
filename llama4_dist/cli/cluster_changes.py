"""`llama4-dist cluster scale`, `rebalance`, `drain` and `cancel`: begin a change, follow it, say what it did."""

from collections.abc import Callable
from dataclasses import asdict

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from llama4_dist.cli.admin import Admin, ChangeFlags
from llama4_dist.cli.cluster_views import duration_of
from llama4_dist.cli.output import EXIT_FAILED, console, error_console, human_bytes, print_json, print_pairs, reporting
from llama4_dist.client.admin import AdminClient
from llama4_dist.client.admin_results import ClusterChange, Operation
from llama4_dist.errors import UnavailableError


def run_change(admin: Admin, flags: ChangeFlags, change: Callable[[AdminClient], Callable[..., Operation]]) -> None:
    """Begin a change, follow it unless told not to, and show its end; exit code 1 where it did not come about.

    `change` names the method of the client, with what only this change is told.
    """
    with reporting(admin.as_json), admin.open() as client:
        operation = change(client)(
            request_id=flags.request_id, validate_only=flags.dry_run, drain_timeout_s=flags.drain_timeout
        )
        if not flags.no_wait and not operation.done:
            operation = follow(client, operation, show=not admin.as_json)
    if admin.as_json:
        print_json({**asdict(operation), "validate_only": flags.dry_run})
    else:
        print_pairs(
            "Plan: nothing was changed" if flags.dry_run else operation.name, summary(operation, planned=flags.dry_run)
        )
    if operation.failed:
        raise typer.Exit(EXIT_FAILED)


def follow(client: AdminClient, operation: Operation, *, show: bool) -> Operation:
    """Wait for the operation's end behind a bar; Ctrl-C leaves the operation running and says so."""
    with Progress(
        TextColumn("[bold]{task.description:>12}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=error_console,
        disable=not show,
    ) as progress:
        task = progress.add_task(operation.phase, total=1.0, detail=detail_of(operation))
        passed = [operation.phase]

        def on_progress(now: Operation) -> None:
            if now.phase != passed[-1]:
                if show:
                    progress.console.print(f"[dim]{passed[-1].replace('_', ' ')} is over[/]")
                passed.append(now.phase)
            described = now.phase.replace("_", " ")
            progress.update(task, description=described, completed=now.progress, detail=detail_of(now))

        try:
            return client.wait(operation.name, on_progress=on_progress)
        except KeyboardInterrupt:
            tell(f"{operation.name} goes on; `llama4-dist cluster cancel {operation.name}` rolls it back")
            raise
        except UnavailableError:
            tell(f"how far {operation.name} is cannot be asked now; `llama4-dist cluster operations` shows it later")
            raise


def tell(remedy: str) -> None:
    """Write one line to stderr, beside the bar or the JSON."""
    error_console.print(remedy, markup=False, highlight=False, soft_wrap=True)


def detail_of(operation: Operation) -> str:
    """What a bar says beside itself."""
    change = operation.change
    if change is None:
        return "no plan yet"
    hosts = f"{operation.hosts_ready} of {len(change.added)} new hosts ready, " if change.added else ""
    return f"{hosts}{operation.moves_done:,} of {change.num_moves:,} moves, {human_bytes(operation.bytes_done)}"


def summary(operation: Operation, *, planned: bool) -> dict[str, object]:
    """What an operator wants to know of a change that was planned, begun, or has ended."""
    rows: dict[str, object] = {"change": operation.kind}
    if not planned:
        rows["result"] = operation.phase.replace("_", " ")
    if operation.change is not None:
        rows |= change_rows(operation, operation.change, planned=planned)
    if not planned:
        rows["serving paused"] = f"{operation.paused_s * 1000:.1f} ms"
    if operation.ended_s is not None:
        rows["duration"] = duration_of(operation)
    if operation.warnings:
        rows["warnings"] = "\n".join(operation.warnings)
    if operation.failed:
        rows["why"] = f"{operation.error_reason}: {operation.error_message}"
    return rows


def change_rows(operation: Operation, change: ClusterChange, *, planned: bool) -> dict[str, object]:
    """The plan, and how much of it was carried out."""
    names = [f"+{host}" for host in change.added] + [f"-{host}" for host in change.removed]
    names += [f"node {node[:8]} is free" for node in change.freed_nodes]
    moves, size = f"{change.num_moves:,}", human_bytes(change.num_bytes)
    return {
        "hosts": f"{change.hosts_before} → {change.hosts_after}" + (f" ({', '.join(names)})" if names else ""),
        "moves": moves if planned else f"{operation.moves_done:,} of {moves}",
        "bytes": size if planned else f"{human_bytes(operation.bytes_done)} of {size}",
        "balance": f"{change.balance_before:.3f} → {change.balance_after:.3f} (busiest host / mean)",
    }


def run_cancel(admin: Admin, name: str) -> None:
    """Ask the operation to roll back; what it was doing then is shown, for it may be too late."""
    full_name = name if "/" in name else f"operations/{name}"
    with reporting(admin.as_json), admin.open() as client:
        client.cancel(full_name)
        operation = client.operation(full_name)
    if admin.as_json:
        print_json(asdict(operation))
        return
    console.print(f"{operation.name} was asked to roll back; it is {operation.phase.replace('_', ' ')}")
