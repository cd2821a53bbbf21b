"""Judges one layout: legal or why not, does it fit, what does a step take, what do a million tokens cost."""

from dataclasses import dataclass

from llama4_dist.planner.layout import Layout, objections
from llama4_dist.planner.memory import Memory, longest_context, memory_of, num_kv_blocks
from llama4_dist.planner.multinomial import SAMPLES
from llama4_dist.planner.request import PlanRequest
from llama4_dist.planner.step import StepTimes, step_times

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout that fits, and its computed figures. Nothing of it is measured."""

    layout: Layout
    memory: Memory
    step: StepTimes
    tokens_per_s: float
    tokens_per_s_and_gpu: float
    price_per_hour: float  # of all devices used

    @property
    def price_per_million_tokens(self) -> float:
        """Price of a million generated tokens while the batch is full."""
        return self.price_per_hour / (self.tokens_per_s * 3600) * 1e6


def refusals(request: PlanRequest, layout: Layout, memory: Memory | None = None) -> list[str]:
    """Return every reason why a layout cannot be, the first the most basic."""
    found = list(objections(layout, request.geometry.config))
    if layout.num_gpus > request.num_gpus:
        found.append(f"it needs {layout.num_gpus} devices and there are {request.num_gpus}")
    if layout.ranks > request.hardware.devices_per_node > 1:
        most = request.hardware.devices_per_node
        found.append(f"T={layout.ranks} reaches over nodes of {most} devices: every layer would wait for the network")
    if found:
        return found
    memory = memory or memory_of(request.geometry, layout, request.traffic.context, request.bytes_per_gpu)
    return _memory_refusals(layout, memory)


def _memory_refusals(layout: Layout, memory: Memory) -> list[str]:
    found, room = [], f"{memory.per_gpu / GB:.1f} GB"
    if not memory.experts_fit:
        found.append(
            f"an expert GPU would hold {memory.expert_weights / GB:.1f} GB and has {room}: "
            "more hosts, more slices, or fewer bits"
        )
    if memory.attention_weights > memory.per_gpu:
        found.append(
            f"an attention GPU would hold {memory.attention_weights / GB:.1f} GB of weights and has {room}: "
            "raise P or T, or use fewer bits"
        )
    elif not memory.attention_fits:
        found.append(
            f"{layout.sequences} sequences take {memory.kv / GB:.1f} GB of KV beside "
            f"{memory.attention_weights / GB:.1f} GB of weights and there are {room}: "
            f"at most {memory.most_sequences} fit"
        )
    return found


def evaluate(request: PlanRequest, layout: Layout, *, samples: int = SAMPLES) -> Plan:
    """Return the figures of a legal layout; the caller has asked `refusals`."""
    step = step_times(request.geometry, layout, request.rates(layout), request.traffic, samples=samples)
    rate = layout.total_sequences / step.step_s
    return Plan(
        layout=layout,
        memory=memory_of(request.geometry, layout, request.traffic.context, request.bytes_per_gpu),
        step=step,
        tokens_per_s=rate,
        tokens_per_s_and_gpu=rate / layout.num_gpus,
        price_per_hour=request.price * layout.num_gpus,
    )


def context_limit(request: PlanRequest, plan: Plan) -> int:
    """Return the longest context at which the plan's batch still fits."""
    return longest_context(request.geometry, plan.layout, plan.memory)


def kv_blocks(request: PlanRequest, plan: Plan) -> int:
    """Return the pages of a group's cache, as `EngineOptions.num_blocks` counts them."""
    return num_kv_blocks(request.geometry, plan.layout, plan.memory)
