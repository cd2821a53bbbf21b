"""Puts the terms of layers together to a decode step of a layout, stages and microbatches included."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.hardware import Rates
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.multinomial import SAMPLES, Slowest
from llama4_dist.planner.roofline import (
    Terms,
    Traffic,
    Work,
    decode_work,
    dense_layer_s,
    expert_load,
    head_s,
    hop_s,
    moe_terms,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """A decode step of a group: every sequence gets a token. Seconds."""

    terms: Terms  # of one microbatch
    microbatches: int  # m, inside a stage
    layer_s: float  # one MoE layer, all microbatches of a stage's part
    dense_layer_s: float
    head_s: float
    pipeline_s: float  # what a stage has nothing to do, and rows between stages; 0 without stages
    step_s: float  # TPOT
    attention_busy: float  # share of the step an attention GPU computes
    expert_busy: float  # share of the step the mean expert GPU computes


def step_times(
    geometry: Geometry, layout: Layout, rates: Rates, traffic: Traffic, *, samples: int = SAMPLES
) -> StepTimes:
    """Return a decode step in which every group has its batch at the traffic's context, and all are in step."""

    def load(rows: int) -> Slowest:
        return expert_load(geometry, layout, rates, rows * layout.groups, traffic, samples=samples)

    return step_of(geometry, layout, rates, decode_work(geometry, layout.sequences, traffic.context), load)


def step_of(geometry: Geometry, layout: Layout, rates: Rates, work: Work, load: Callable[[int], Slowest]) -> StepTimes:
    """TPOT = n_moe layer + n_dense T_dense_layer + T_lmhead + T_sched, of any work of one group.

    `load` says what expert hosts take while each group's microbatch has so many rows. With P stages the work is that of
    up to P steps in flight, each of other sequences: a part passes P turns of a stage, n/P layers each, while others
    are in the stages before and behind it. All of it takes as long as the longest of three: a part's way, the last
    stage with its head for all parts, and the mean expert host for all parts, which are in different layers.
    """
    stages = layout.stages
    part, num_parts, turns = _parts(work, stages)
    microbatches = min(layout.microbatches, part.rows)
    layout = replace(layout, microbatches=microbatches)
    micro = part.part(microbatches)
    terms = moe_terms(geometry, layout, rates, micro, load(micro.rows))
    layer_s = terms.layer_s(microbatches)
    dense_s = dense_layer_s(geometry, layout, rates, part) if geometry.num_dense_layers else 0.0
    stage_s = (geometry.num_moe_layers * layer_s + geometry.num_dense_layers * dense_s) / stages
    last_s = head_s(geometry, layout, rates, part.logit_rows)
    hops_s = (stages - 1) * hop_s(geometry, layout, rates, part.rows)
    hosts_s = num_parts * geometry.num_moe_layers * microbatches * terms.expert_mean_s
    total_s = max(turns * stage_s + hops_s + last_s + rates.step_s, num_parts * (stage_s + last_s), hosts_s)
    own_s = geometry.num_moe_layers * microbatches * terms.own_s + geometry.num_dense_layers * dense_s
    return StepTimes(
        terms=terms,
        microbatches=microbatches,
        layer_s=layer_s,
        dense_layer_s=dense_s,
        head_s=last_s,
        pipeline_s=total_s - num_parts * stage_s - last_s - rates.step_s if stages > 1 else 0.0,
        step_s=total_s,
        attention_busy=min(1.0, num_parts * (own_s + last_s) / stages / total_s),
        expert_busy=min(1.0, hosts_s / total_s),
    )


def _parts(work: Work, stages: int) -> tuple[Work, int, int]:
    """Return the largest part, the number of parts, and the turns from a step's beginning to its tokens.

    As the engine shares out work (`engine.in_flight`): a step for each stage while there are sequences for it; where
    there are fewer, each step goes out in several parts and waits for its last.
    """
    num_steps = min(stages, work.sequences)
    step = work.part(num_steps)
    parts_of_step = min(step.rows, -(-stages // num_steps))
    return step.part(parts_of_step), num_steps * parts_of_step, stages + parts_of_step - 1
