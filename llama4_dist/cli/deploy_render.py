"""The work of `llama4-dist deploy render`: shows what changed, or the difference where nothing may change."""

from pathlib import Path

from rich.syntax import Syntax

from llama4_dist.cli.output import EXIT_FAILED, console, error_console, fail, print_json, print_pairs, reporting
from llama4_dist.deploy.overlay_file import read_overlay
from llama4_dist.deploy.plan_file import DeployPlan, read_plan
from llama4_dist.deploy.pods import attention_group, expert_group
from llama4_dist.deploy.render import PLAN, SETTINGS, render, stale


def run_render(overlay: Path, plan_file: Path | None, *, check: bool, as_json: bool) -> None:
    """Render or check one overlay."""
    with reporting(as_json):
        difference = stale(overlay, plan_file) if check else ""
        changed = [] if check else render(overlay, plan_file)
        plan = read_plan(plan_file or overlay / PLAN)
        table = summary(overlay, plan)
    if difference:
        if not as_json:
            error_console.print(Syntax(difference, "diff", background_color="default"))
        message = f"{overlay} is stale: run `llama4-dist deploy render --overlay {overlay}`"
        fail(message, reason="STALE", code=EXIT_FAILED, as_json=as_json)
    if as_json:
        print_json({"overlay": str(overlay), "changed": [str(file) for file in changed], **table})
        return
    print_pairs(f"{overlay}", table)
    for file in changed:
        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    if not changed:
        console.print("[dim]nothing to write: the overlay says what its plan says[/]")


def summary(overlay: Path, plan: DeployPlan) -> dict[str, object]:
    """Say what the overlay runs."""
    settings = read_overlay(overlay / SETTINGS)
    attention, experts = attention_group(plan, settings), expert_group(plan, settings)
    return {
        "model": plan.model + (" (synthetic geometry: no weights exist)" if plan.synthetic else ""),
        "hardware": f"{plan.devices_used} of {plan.num_devices} {plan.hardware}",
        "attention_pods": attention.num_pods,
        "expert_pods": experts.num_pods,
        "max_expert_pods": experts.max_replicas,
        "gpus_per_attention_pod": attention.gpus,
        "gpus_per_expert_pod": experts.gpus,
    }
