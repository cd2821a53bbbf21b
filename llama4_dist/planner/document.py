"""Writes a plan as the JSON document `llama4_dist.plan/1`, which deployments and checks read (docs/planner.md).

Fields are only ever added to a version; a reader ignores what it does not know.
"""

from collections.abc import Sequence
from typing import Any

from llama4_dist.planner import formats
from llama4_dist.planner.explain import explain
from llama4_dist.planner.geometry import KV_BLOCK
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.memory import slices_per_host
from llama4_dist.planner.plan import Plan, context_limit, kv_blocks
from llama4_dist.planner.request import PlanRequest

SCHEMA = "llama4_dist.plan/1"
NOTE = "computed from the stated rates, not measured"
SYNTHETIC_NOTE = (
    "this geometry is synthetic: of Behemoth only 16 experts, 288B active and about 2T parameters were ever published"
)


def notes(request: PlanRequest) -> list[str]:
    """Return what a reader must know before believing a figure."""
    return [f"figures are {NOTE}", *([SYNTHETIC_NOTE] if request.synthetic else [])]


def plan_document(request: PlanRequest, plan: Plan, alternatives: Sequence[Plan] = ()) -> dict[str, Any]:
    """Return the whole document; bytes are whole numbers, times seconds, prices as given."""
    return {
        "schema": SCHEMA,
        "notes": notes(request),
        "model": _model(request),
        "hardware": _hardware(request),
        "workload": {
            "context": request.traffic.context,
            "objective": request.objective.value,
            "slo_tpot_s": request.slo_tpot_s,
            "expert_popularity": list(request.traffic.popularity),
            "pooled": request.traffic.pooled,
        },
        "layout": layout_document(plan.layout),
        "engine": _engine(request, plan),
        "worker_groups": _worker_groups(request, plan),
        "figures": figures(request, plan),
        "explanation": explain(request, plan),
        "alternatives": [
            {"layout": layout_document(other.layout), "figures": figures(request, other)} for other in alternatives
        ],
    }


def layout_document(layout: Layout) -> dict[str, Any]:
    """Return a layout under the names of `--layout`."""
    return {
        "stages": layout.stages,
        "ranks": layout.ranks,
        "groups": layout.groups,
        "hosts": layout.hosts,
        "gpus_per_host": layout.gpus_per_host,
        "slices": layout.slices,
        "replicas": layout.replicas,
        "batch": layout.sequences,
        "microbatches": layout.microbatches,
        "dtype": layout.dtype,
        "wire_dtype": layout.wire,
        "kv_dtype": layout.kv_dtype,
        "link": layout.link,
    }


def figures(request: PlanRequest, plan: Plan) -> dict[str, Any]:
    """Return a plan's computed figures; terms are of one MoE layer and one microbatch."""
    step, terms = plan.step, plan.step.terms
    return {
        "measured": False,
        "tpot_s": step.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s_and_gpu,
        "price_per_million_tokens": plan.price_per_million_tokens,
        "layer_s": step.layer_s,
        "dense_layer_s": step.dense_layer_s,
        "head_s": step.head_s,
        "pipeline_s": step.pipeline_s,
        "terms": {
            "attention_s": terms.attention_s,
            "shared_s": terms.shared_s,
            "expert_s": terms.expert_s,
            "dispatch_s": terms.dispatch_s,
            "combine_s": terms.combine_s,
        },
        "exposed_s": terms.exposed_s(step.microbatches),
        "microbatches_needed": terms.microbatches_needed,
        "attention_busy": step.attention_busy,
        "expert_busy": step.expert_busy,
        "attention_gpu_bytes": round(plan.memory.attention),
        "expert_gpu_bytes": round(plan.memory.expert_weights),
        "longest_context": context_limit(request, plan),
    }


def _model(request: PlanRequest) -> dict[str, Any]:
    geometry, config = request.geometry, request.geometry.config
    return {
        "name": request.model,
        "synthetic": request.synthetic,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "moe_layers": list(config.moe_layer_ids),
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "expert_width": config.expert_width,
        "dense_width": config.dense_width,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "vocab_size": config.vocab_size,
        "chunk_size": config.chunk_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_parameters": geometry.total_parameters,
        "num_active_parameters": geometry.active_parameters,
    }


def _hardware(request: PlanRequest) -> dict[str, Any]:
    hardware, rates = request.hardware, request.rates(request.defaults)
    return {
        "kind": hardware.name,
        "available": request.num_gpus,
        "devices_per_node": hardware.devices_per_node,
        "memory_bytes": round(hardware.memory_bytes),
        "memory_share": request.memory_share,
        "price_per_device_hour": request.price,
        "rates_from": "measured" if request.measured_rates else "datasheet x efficiency",
        "memory_bytes_per_s": rates.memory,
        "flops_per_s": rates.flops,
        "link_bytes_per_s": rates.link,
        "alpha_s": rates.alpha_s,
    }


def _engine(request: PlanRequest, plan: Plan) -> dict[str, Any]:
    """The settings of the engine that follow from the plan, under the engine's names."""
    layout = plan.layout
    return {
        "max_context": request.traffic.context,
        "max_num_seqs": layout.sequences,
        "block_size": KV_BLOCK,
        "num_blocks": kv_blocks(request, plan),
        "kv_dtype": layout.kv_dtype,
        "num_microbatches": layout.microbatches,
        "expert_slices": layout.slices,
        "num_replicas": layout.replicas,
        "num_expert_hosts": layout.hosts,
        "num_attention_workers": layout.groups,
    }


def _worker_groups(request: PlanRequest, plan: Plan) -> list[dict[str, Any]]:
    layout, memory = plan.layout, plan.memory
    attention = {
        "name": "attention",
        "role": "attention",
        "count": layout.attention_gpus,
        "groups": layout.groups,
        "stages": layout.stages,
        "ranks": layout.ranks,
        "gpus_per_worker": 1,
        "gpu_memory_bytes": round(memory.attention),
        "weights_bytes": round(memory.attention_weights),
        "kv_bytes": round(memory.kv),
    }
    slices = slices_per_host(request.geometry, layout)
    expert = {
        "name": "expert",
        "role": "expert",
        "count": layout.hosts,
        "gpus_per_worker": layout.gpus_per_host,
        "gpu_memory_bytes": round(memory.expert_weights),
        "weights_bytes": round(memory.expert_weights * layout.gpus_per_host),
        "layer_slices_held": slices,
        "slice_bytes": round(request.geometry.expert_parameters * formats.weight_bytes(layout.dtype) / layout.slices),
    }
    if layout.gpus_per_group == 1:
        return [attention, expert]
    # A group of several members has a leader without layers: it schedules, samples and talks to gateways.
    leader = {"name": "leader", "role": "leader", "count": layout.groups, "gpus_per_worker": 0}
    return [leader, attention, expert]
