"""The commands `plan` and `simulate`; their flags are in plan_flags, their work is in the files of these names."""

from typing import Annotated

import typer

from llama4_dist.cli.flag_groups import with_flag_groups
from llama4_dist.cli.plan_flags import LoadFlags, PlanFlags, PlanOutput, SimulationOutput

Price = Annotated[float | None, typer.Option(help="Of a device and hour; default: an example figure.")]


@with_flag_groups
def plan(flags: PlanFlags, *, price: Price = None, output: PlanOutput) -> None:
    """Find the best layout of a cluster for a model, or judge one; figures are computed, not measured."""
    from llama4_dist.cli.plan import run_plan

    run_plan(flags, price, output)


@with_flag_groups
def simulate(flags: PlanFlags, load: LoadFlags, output: SimulationOutput) -> None:
    """Serve a load on a planned cluster in simulated time, hosts dying and coming as told."""
    from llama4_dist.cli.simulate import run_simulate

    run_simulate(flags, load, output)
