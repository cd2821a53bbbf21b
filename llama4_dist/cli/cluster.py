"""The `llama4-dist cluster` commands and their flags; each one's work is in cluster_views or cluster_changes."""

from typing import Annotated

import typer

from llama4_dist.cli.flags import AdminAddress, DrainTimeout, DryRun, JsonFlag, NoWait, RequestId, TlsCa, Token

cluster_app = typer.Typer(
    name="cluster", help="Show and change a running cluster through its admin server.", no_args_is_help=True
)


@cluster_app.command()
def status(server: AdminAddress, token: Token = None, tls_ca: TlsCa = None, as_json: JsonFlag = False) -> None:
    """Show every process of the cluster."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.cluster_views import run_status

    run_status(Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json))


@cluster_app.command()
def watch(server: AdminAddress, token: Token = None, tls_ca: TlsCa = None, as_json: JsonFlag = False) -> None:
    """Show the cluster again after every change, until Ctrl-C."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.cluster_views import run_watch

    run_watch(Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json))


@cluster_app.command()
def scale(  # noqa: PLR0913 (flags of a command)
    server: AdminAddress,
    experts: Annotated[int, typer.Option(help="Number of expert hosts wanted.")],
    token: Token = None,
    tls_ca: TlsCa = None,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    request_id: RequestId = "",
    drain_timeout: DrainTimeout = None,
    as_json: JsonFlag = False,
) -> None:
    """Bring the expert pool to a number of hosts while tokens flow."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.cluster_changes import run_change

    admin = Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json)
    run_change(
        admin,
        lambda client: client.scale(
            experts, request_id=request_id, validate_only=dry_run, drain_timeout_s=drain_timeout
        ),
        dry_run=dry_run,
        wait=not no_wait,
    )


@cluster_app.command()
def rebalance(
    server: AdminAddress,
    token: Token = None,
    tls_ca: TlsCa = None,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    request_id: RequestId = "",
    drain_timeout: DrainTimeout = None,
    as_json: JsonFlag = False,
) -> None:
    """Move experts by measured load, as far as that pays."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.cluster_changes import run_change

    admin = Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json)
    run_change(
        admin,
        lambda client: client.rebalance(request_id=request_id, validate_only=dry_run, drain_timeout_s=drain_timeout),
        dry_run=dry_run,
        wait=not no_wait,
    )


@cluster_app.command()
def drain(  # noqa: PLR0913 (flags of a command)
    host: Annotated[str, typer.Argument(help="The expert host, as `cluster status` names it.")],
    server: AdminAddress,
    token: Token = None,
    tls_ca: TlsCa = None,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    request_id: RequestId = "",
    drain_timeout: DrainTimeout = None,
    as_json: JsonFlag = False,
) -> None:
    """Move everything off one expert host and end it."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.cluster_changes import run_change

    admin = Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json)
    run_change(
        admin,
        lambda client: client.drain(host, request_id=request_id, validate_only=dry_run, drain_timeout_s=drain_timeout),
        dry_run=dry_run,
        wait=not no_wait,
    )


@cluster_app.command()
def operations(server: AdminAddress, token: Token = None, tls_ca: TlsCa = None, as_json: JsonFlag = False) -> None:
    """List operations, newest first."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.cluster_views import run_operations

    run_operations(Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json))


@cluster_app.command()
def cancel(
    name: Annotated[str, typer.Argument(help="The operation, e.g. operations/7 or 7.")],
    server: AdminAddress,
    token: Token = None,
    tls_ca: TlsCa = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask an operation to roll back."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.cluster_changes import run_cancel

    run_cancel(Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json), name)
