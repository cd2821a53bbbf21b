"""The `llama4-dist cluster` commands and their flags; each one's work is in cluster_views or cluster_changes."""

from functools import partial
from typing import Annotated

import typer

from llama4_dist.cli.admin import Admin, ChangeFlags
from llama4_dist.cli.flag_groups import with_flag_groups

cluster_app = typer.Typer(
    name="cluster", help="Show and change a running cluster through its admin server.", no_args_is_help=True
)


@cluster_app.command()
@with_flag_groups
def status(admin: Admin) -> None:
    """Show every process of the cluster."""
    from llama4_dist.cli.cluster_views import run_status

    run_status(admin)


@cluster_app.command()
@with_flag_groups
def watch(admin: Admin) -> None:
    """Show the cluster again after every change, until Ctrl-C."""
    from llama4_dist.cli.cluster_views import run_watch

    run_watch(admin)


@cluster_app.command()
@with_flag_groups
def scale(
    experts: Annotated[int, typer.Option(help="Number of expert hosts wanted.")], admin: Admin, flags: ChangeFlags
) -> None:
    """Bring the expert pool to a number of hosts while tokens flow."""
    from llama4_dist.cli.cluster_changes import run_change

    run_change(admin, flags, lambda client: partial(client.scale, experts))


@cluster_app.command()
@with_flag_groups
def rebalance(admin: Admin, flags: ChangeFlags) -> None:
    """Move experts by measured load, as far as that pays."""
    from llama4_dist.cli.cluster_changes import run_change

    run_change(admin, flags, lambda client: client.rebalance)


@cluster_app.command()
@with_flag_groups
def drain(
    host: Annotated[str, typer.Argument(help="The expert host, as `cluster status` names it.")],
    admin: Admin,
    flags: ChangeFlags,
) -> None:
    """Move everything off one expert host and end it."""
    from llama4_dist.cli.cluster_changes import run_change

    run_change(admin, flags, lambda client: partial(client.drain, host))


@cluster_app.command()
@with_flag_groups
def operations(admin: Admin) -> None:
    """List operations, newest first."""
    from llama4_dist.cli.cluster_views import run_operations

    run_operations(admin)


@cluster_app.command()
@with_flag_groups
def cancel(name: Annotated[str, typer.Argument(help="The operation, e.g. operations/7 or 7.")], admin: Admin) -> None:
    """Ask an operation to roll back."""
    from llama4_dist.cli.cluster_changes import run_cancel

    run_cancel(admin, name)
