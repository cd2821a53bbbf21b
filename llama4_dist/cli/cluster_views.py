"""`llama4-dist cluster status`, `watch` and `operations`: the cluster and its changes as tables or JSON."""

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llama4_dist.cli.admin import Admin
from llama4_dist.cli.output import console, human_bytes, print_json, reporting, until_ctrl_c
from llama4_dist.client.admin import AdminClient
from llama4_dist.client.admin_results import Cluster, Operation, Worker
from llama4_dist.errors import UnavailableError

STATE_STYLES = {"ready": "green", "loading": "yellow", "new": "yellow", "draining": "yellow", "lost": "bold red"}
WORKER_COLUMNS = ("worker", "role", "state", "inc.", "pid", "node", "address", "epoch", "experts", "memory")
GROUP_COLUMNS = ("place", "layers", "formation")  # shown where the model is cut
RIGHT_ALIGNED = {"inc.", "pid", "epoch", "experts", "memory", "progress", "moves", "duration"}


def run_status(admin: Admin) -> None:
    """Show the cluster once."""
    with reporting(admin.as_json), admin.open() as client:
        cluster = client.status()
    if admin.as_json:
        print_json(asdict(cluster))
        return
    console.print(cluster_view(cluster))


def run_watch(admin: Admin) -> None:
    """Show the cluster after every change until Ctrl-C; a controller that is away for a while ends nothing."""
    with reporting(admin.as_json), admin.open() as client, until_ctrl_c():
        if admin.as_json:
            for cluster in client.watch():
                print_json(asdict(cluster))
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                follow(client, lambda view: live.update(view, refresh=True))
        else:
            follow(client, console.print)


def follow(client: AdminClient, show: Callable[[RenderableType], object]) -> None:
    """Show every view; once there was one, say that the cluster cannot be asked, and ask again."""
    last: RenderableType | None = None
    while True:
        try:
            for cluster in client.watch():
                last = cluster_view(cluster)
                show(last)
        except UnavailableError as error:
            if last is None:
                raise
            show(Group(last, Text(f"not answering ({error.reason}), asking again", style="bold yellow")))
            time.sleep(error.retry_after_s or 1.0)


def run_operations(admin: Admin) -> None:
    """List operations."""
    with reporting(admin.as_json), admin.open() as client:
        operations = client.operations()
    if admin.as_json:
        print_json([asdict(operation) for operation in operations])
        return
    console.print(operations_view(operations) if operations else "no operation is known")


def cluster_view(cluster: Cluster) -> RenderableType:
    """Lay out the cluster: one line about it, one row per process."""
    change = f", {cluster.operation} under way" if cluster.operation else ""
    copies = f"{cluster.num_replicas} cop{'y' if cluster.num_replicas == 1 else 'ies'} of each expert"
    copies += f" in {cluster.num_slices} slices" if cluster.num_slices > 1 else ""
    title = f"{cluster.model}: {cluster.num_hosts} expert hosts, {copies}, epoch {cluster.epoch}{change}"
    is_cut = any(worker.group for worker in cluster.workers)
    table = new_table(title, WORKER_COLUMNS + (GROUP_COLUMNS if is_cut else ()))
    for worker in cluster.workers:
        table.add_row(
            worker.worker,
            worker.role,
            Text(worker.state, style=STATE_STYLES.get(worker.state, "")),
            str(worker.incarnation),
            str(worker.pid),
            worker.node[:8],
            "\n".join(worker.addresses) or "–",
            str(worker.epoch),
            f"{worker.num_experts:,}",
            human_bytes(worker.memory_bytes),
            *(group_cells(worker) if is_cut else ()),
        )
    return table


def group_cells(worker: Worker) -> tuple[str, str, RenderableType]:
    """Say which part of the model a process of an attention group holds, and whether it is of a group now."""
    if not worker.group:
        return "–", "–", Text("–")
    last = worker.first_layer + worker.num_layers - 1
    layers = f"{worker.first_layer}–{last}" if worker.num_layers else "–"
    place = f"stage {worker.stage}, rank {worker.rank}" if worker.num_layers else "leader"
    formation = Text(str(worker.formation)) if worker.formation else Text("not formed", style="bold red")
    return place, layers, formation


def operations_view(operations: tuple[Operation, ...]) -> RenderableType:
    """Lay out operations, one row each."""
    table = new_table("Operations", ("name", "kind", "phase", "progress", "hosts", "moves", "began", "duration", "why"))
    for operation in operations:
        change = operation.change
        table.add_row(
            operation.name,
            operation.kind,
            Text(operation.phase, style="red" if operation.failed else "green" if operation.done else "yellow"),
            f"{operation.progress:.0%}",
            f"{change.hosts_before} → {change.hosts_after}" if change else "–",
            f"{operation.moves_done:,} of {change.num_moves:,}" if change else "–",
            datetime.fromtimestamp(operation.started_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ"),
            duration_of(operation),
            operation.error_message,
        )
    return table


def duration_of(operation: Operation) -> str:
    """How long an operation took; a dash while it runs, for the server's clock is not ours."""
    if operation.ended_s is None:
        return "–"
    return f"{operation.ended_s - operation.started_s:.1f} s"


def new_table(title: str, columns: tuple[str, ...]) -> Table:
    """Begin a table; numbers are right-aligned and nothing is cut off."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT_ALIGNED else "left", overflow="fold")
    return table
