"""How many slices fit a host, and how long it reads them; bytes of a plan, no events."""

from llama4_dist.planner import formats
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.recovery import reload_s
from llama4_dist.planner.request import PlanRequest


def slices_that_fit(request: PlanRequest, layout: Layout) -> int:
    """Return how many slices of a layer fit a host's memory beside as many of all other layers."""
    return int(request.bytes_per_gpu // _bytes_per_gpu(request, layout))


def read_s(request: PlanRequest, layout: Layout, slices: int, source: str) -> float:
    """Return how long a host reads so many slices of every layer; its GPUs read side by side."""
    network = request.efficiency.network
    return reload_s(slices * _bytes_per_gpu(request, layout), request.hardware, source, efficiency=network)


def _bytes_per_gpu(request: PlanRequest, layout: Layout) -> float:
    """One slice of every layer, on each GPU of a host."""
    geometry = request.geometry
    piece = geometry.expert_parameters * formats.weight_bytes(layout.dtype) / layout.slices
    return geometry.num_moe_layers * piece / layout.gpus_per_host
