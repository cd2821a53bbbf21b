"""The `llama4-dist experts` commands and their flags; the work is in experts_top."""

from typing import Annotated

import typer

from llama4_dist.cli.admin import Admin
from llama4_dist.cli.flag_groups import with_flag_groups
from llama4_dist.cli.flags import parse_seconds

experts_app = typer.Typer(name="experts", help="Show what the experts of a running cluster do.", no_args_is_help=True)


@experts_app.callback()
def experts() -> None:
    """Keep `top` a subcommand: typer would put the only command in its group's place."""


@experts_app.command()
@with_flag_groups
def top(
    admin: Admin,
    *,
    once: Annotated[bool, typer.Option("--once", help="Show one interval and end.")] = False,
    interval: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="TIME", help="Time between pictures, e.g. 1s or 500ms.")
    ] = 1.0,
    layer: Annotated[int | None, typer.Option(help="Only this layer.")] = None,
) -> None:
    """Show the load of every expert and host, live, until Ctrl-C."""
    from llama4_dist.cli.experts_top import run_top

    run_top(admin, once=once, interval_s=interval, layer=layer)
