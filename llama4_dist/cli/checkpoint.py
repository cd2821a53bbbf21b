"""The `llama4-dist checkpoint` commands; each command's work is in the file of its name."""

import typer

from llama4_dist.cli.checkpoint_quantize import quantize

checkpoint_app = typer.Typer(name="checkpoint", help="Make checkpoints of checkpoints.", no_args_is_help=True)
checkpoint_app.command()(quantize)


@checkpoint_app.callback()
def checkpoint() -> None:
    """Keep a subcommand one: typer would put the only command in its group's place."""
