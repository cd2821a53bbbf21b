"""The `llama4-dist experts` commands and their flags; the work is in experts_top."""

from typing import Annotated

import typer

from llama4_dist.cli.flags import AdminAddress, JsonFlag, TlsCa, Token, parse_seconds

experts_app = typer.Typer(name="experts", help="Show what the experts of a running cluster do.", no_args_is_help=True)


@experts_app.callback()
def experts() -> None:
    """Keep `top` a subcommand: typer would put the only command in its group's place."""


@experts_app.command()
def top(
    server: AdminAddress,
    token: Token = None,
    tls_ca: TlsCa = None,
    once: Annotated[bool, typer.Option("--once", help="Show one interval and end.")] = False,
    interval: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="TIME", help="Time between pictures, e.g. 1s or 500ms.")
    ] = 1.0,
    layer: Annotated[int | None, typer.Option(help="Only this layer.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the load of every expert and host, live, until Ctrl-C."""
    from llama4_dist.cli.admin import Admin
    from llama4_dist.cli.experts_top import run_top

    admin = Admin(server=server, token=token, tls_ca=tls_ca, as_json=as_json)
    run_top(admin, once=once, interval_s=interval, layer=layer)
