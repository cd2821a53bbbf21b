"""Requests and steps that several tests ask the planner for."""

from typing import Any

from llama4_dist.checkpoint.presets import SYNTHETIC, preset
from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.hardware import HARDWARE, Efficiency, rates
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.multinomial import zipf
from llama4_dist.planner.request import PlanRequest
from llama4_dist.planner.roofline import Traffic
from llama4_dist.planner.step import StepTimes, step_times


def geometry(model: str) -> Geometry:
    return Geometry(config=preset(model))


def uniform(model: str, context: int = 8192) -> Traffic:
    return Traffic(context=context, popularity=zipf(geometry(model).config.num_experts, 0.0))


def step(model: str, layout: Layout, *, context: int = 8192, **efficiency: float) -> StepTimes:
    """Return a decode step on H200s."""
    h200 = rates(HARDWARE["H200"], Efficiency(**efficiency), dtype=layout.dtype, link=layout.link)
    return step_times(geometry(model), layout, h200, uniform(model, context))


def request(model: str = "behemoth", num_gpus: int = 96, **changes: Any) -> PlanRequest:
    fields: dict[str, Any] = {
        "model": model,
        "synthetic": model in SYNTHETIC,
        "geometry": geometry(model),
        "hardware": HARDWARE["H200"],
        "num_gpus": num_gpus,
        "traffic": uniform(model),
        "defaults": Layout(),
    }
    return PlanRequest(**(fields | changes))
