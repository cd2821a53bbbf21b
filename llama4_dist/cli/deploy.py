"""`llama4-dist deploy`: a plan in, the generated part of a Kubernetes overlay out."""

from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.flags import JsonFlag

deploy_app = typer.Typer(name="deploy", help="Bring a plan to Kubernetes.", no_args_is_help=True)

Overlay = Annotated[Path, typer.Option("--overlay", help="Kustomize overlay that holds deploy.yaml.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan to bring in; default: the overlay's plan.json.")]
Check = Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 where the overlay is stale.")]


@deploy_app.callback()
def deploy() -> None:
    """Bring a plan to Kubernetes."""


@deploy_app.command()
def render(overlay: Overlay, plan: PlanFile = None, check: Check = False, as_json: JsonFlag = False) -> None:
    """Rewrite an overlay's generated files, and its plan.json, from a plan of `llama4-dist plan --out`."""
    from llama4_dist.cli.deploy_render import run_render

    run_render(overlay, plan, check=check, as_json=as_json)
