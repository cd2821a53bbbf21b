"""Puts the terms of layers together to a decode step of a layout, stages and microbatches included."""

from dataclasses import dataclass

from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.hardware import Rates
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.multinomial import SAMPLES
from llama4_dist.planner.roofline import Terms, Traffic, dense_layer_s, head_s, hop_s, moe_terms


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """A decode step of a group: every sequence gets a token. Seconds."""

    terms: Terms  # of one microbatch
    microbatches: int  # m, inside a stage
    layer_s: float  # one MoE layer, all microbatches of a stage's part
    dense_layer_s: float
    head_s: float
    pipeline_s: float  # filling and draining stages, and rows between them; 0 without stages
    step_s: float  # TPOT
    attention_busy: float  # share of the step an attention GPU computes
    expert_busy: float  # share of the step the mean expert GPU computes

    @property
    def tokens_per_s_and_sequence(self) -> float:
        return 1.0 / self.step_s


def step_times(
    geometry: Geometry, layout: Layout, rates: Rates, traffic: Traffic, *, samples: int = SAMPLES
) -> StepTimes:
    """TPOT = n_moe layer + n_dense T_dense_layer + T_lmhead + T_sched.

    With P stages the batch is cut into P parts and a step takes P + (P - 1) turns of a stage, n/P layers each: the
    leader plans the next step when it has all tokens of this one, so the pipeline fills and drains every step.
    """
    stages, batch = layout.stages, layout.sequences
    part = -(-batch // stages)  # sequences of a stage's turn
    rows = -(-part // layout.microbatches)
    parts = -(-batch // part)
    terms = moe_terms(geometry, layout, rates, rows, traffic, samples=samples)
    layer_s = terms.layer_s(layout.microbatches)
    dense_s = dense_layer_s(geometry, layout, rates, part, traffic.context) if geometry.num_dense_layers else 0.0
    through_s = geometry.num_moe_layers * layer_s + geometry.num_dense_layers * dense_s
    last_s = head_s(geometry, layout, rates, batch)
    hops_s = 0.0 if stages == 1 else (parts + stages - 2) * hop_s(geometry, layout, rates, part)
    turns = parts + stages - 1
    total_s = turns * through_s / stages + hops_s + last_s + rates.step_s
    own_s = parts * (geometry.num_moe_layers * layout.microbatches * terms.own_s + geometry.num_dense_layers * dense_s)
    busy_s = parts * geometry.num_moe_layers * layout.microbatches * terms.expert_mean_s
    return StepTimes(
        terms=terms,
        microbatches=layout.microbatches,
        layer_s=layer_s,
        dense_layer_s=dense_s,
        head_s=last_s,
        pipeline_s=(turns - parts) * through_s / stages + hops_s,
        step_s=total_s,
        attention_busy=min(1.0, (own_s / stages + last_s / stages) / total_s),
        expert_busy=min(1.0, busy_s / total_s),
    )
