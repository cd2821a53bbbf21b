"""Says in words what binds a plan and what would move it; reads figures, computes none of its own."""

from collections.abc import Iterator

from llama4_dist.planner import formats
from llama4_dist.planner.plan import Plan, context_limit
from llama4_dist.planner.request import PlanRequest
from llama4_dist.planner.roofline import Terms, ridge_rows

NEAR = 0.02


def explain(request: PlanRequest, plan: Plan) -> list[str]:
    """Return sentences, the one that matters most first."""
    return [what_binds(plan), *_experts(request, plan), *_memory(request, plan), *_stages(plan)]


def what_binds(plan: Plan) -> str:
    """Name the term that a layer waits for."""
    terms, parts, layer_s = plan.step.terms, plan.step.microbatches, plan.step.layer_s
    exposed = terms.exposed_s(parts)
    if exposed <= NEAR * layer_s:
        return (
            f"attention binds: dispatch and experts ({_us(parts * terms.expert_s)} of experts) are hidden behind "
            f"{_us(parts * terms.own_s)} of attention and shared expert"
        )
    if parts > 1 and parts * terms.expert_s >= (1 - NEAR) * layer_s:
        return (
            f"experts bind: the slowest host needs {_us(parts * terms.expert_s)} of the layer's {_us(layer_s)}; "
            "more slices or more hosts shorten it"
        )
    return (
        f"the way to the experts and back binds: {_us(terms.reply_s)} ({_parts(terms)}), of which {_us(exposed)} "
        f"are not hidden; {terms.microbatches_needed:.2f} microbatches would hide it"
    )


def _experts(request: PlanRequest, plan: Plan) -> Iterator[str]:
    layout, geometry = plan.layout, request.geometry
    rows = layout.total_sequences / (layout.stages * layout.microbatches) * geometry.config.experts_per_token
    per_expert = rows / geometry.config.num_experts
    ridge = ridge_rows(request.rates(layout), formats.weight_bytes(layout.dtype))
    side = "reading weights" if per_expert < ridge else "arithmetic"
    yield f"an expert gets {per_expert:.1f} rows on average and the ridge lies at {ridge:.0f}: {side} is its limit"
    if layout.groups > 1 and request.traffic.pooled:
        yield (
            f"experts read weights once for all {layout.groups} groups; groups out of step would read them up to "
            f"{layout.groups} times"
        )


def _memory(request: PlanRequest, plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield (
        f"memory: attention GPU {memory.attention / 1e9:.1f} GB ({memory.attention_weights / 1e9:.1f} weights, "
        f"{memory.kv / 1e9:.1f} KV), expert GPU {memory.expert_weights / 1e9:.1f} GB, of {memory.per_gpu / 1e9:.1f} GB"
    )
    yield f"this batch fits up to a context of {context_limit(request, plan):,}"


def _stages(plan: Plan) -> Iterator[str]:
    if plan.layout.stages > 1:
        share = plan.step.pipeline_s / plan.step.step_s
        yield f"stages wait for each other, for experts and for rows between them {share:.0%} of a step"


def _parts(terms: Terms) -> str:
    return f"{_us(terms.dispatch_s)} out, {_us(terms.expert_s)} expert, {_us(terms.combine_s)} back"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} us"
