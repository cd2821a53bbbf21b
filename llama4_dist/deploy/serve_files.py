"""The settings of `llama4-dist serve` and `gateway` that follow from a plan. Addresses and secrets are flags."""

from typing import Any

from llama4_dist.deploy.overlay_file import OverlaySettings
from llama4_dist.deploy.plan_file import DeployPlan
from llama4_dist.errors import ConfigError

MAX_SEQUENCES = 65536
MICROBATCHES = (1, 2)  # what an engine without stages can be told; stages set their own number
# From the plan's words to the settings' own. Weights of fp8 and int4 are a checkpoint's format: nothing is told.
COMPUTE = {"float32": "float32", "bf16": "bfloat16", "fp8": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}
WIRE = {"float32": "", "bf16": "bfloat16", "fp8": "float8_e4m3"}
KV = {"float32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3"}


def driver_settings(plan: DeployPlan, settings: OverlaySettings) -> dict[str, Any]:
    """Return what the process that starts the cluster reads."""
    dtype = _word(COMPUTE, "dtype", plan.dtype)
    wire = _word(WIRE, "wire_dtype", plan.wire)
    told: dict[str, Any] = {
        "model": str(settings.model_dir),
        "model_name": settings.model_name,
        "experts": plan.hosts,
        "attention": plan.groups,
        "replicas": plan.replicas,
        "dtype": dtype,
        "device": "cpu" if plan.on_cpu else "cuda",
        "num_threads": settings.attention_cores,
        "kv_dtype": _word(KV, "kv_dtype", plan.kv_dtype),
        "kv_cache_bytes": plan.kv_bytes,
        "max_context": plan.context,
        "max_num_seqs": _sequences(plan.sequences),
        "start_timeout_s": settings.start_timeout_s,
        "placement_timeout_s": settings.placement_timeout_s,
        "demand_roles": True,
    }
    if plan.on_cpu and plan.dtype == "int8":
        told |= {"weights": "int8", "dtype": "float32"}
    if wire and wire != dtype:
        told["wire"] = wire
    if plan.stages == 1 and plan.microbatches in MICROBATCHES:
        told["num_microbatches"] = plan.microbatches
    # Left out where there is one of each, so that a build that knows no cuts serves such a plan.
    cuts = {"expert_slices": plan.slices, "stages": plan.stages, "tensor": plan.ranks}
    return told | {name: number for name, number in cuts.items() if number > 1}


def gateway_settings(plan: DeployPlan, settings: OverlaySettings) -> dict[str, Any]:
    """Return what each gateway reads: enough room for what all groups decode together."""
    return {
        "model": str(settings.model_dir),
        "model_name": settings.model_name,
        "max_num_seqs": _sequences(plan.sequences * plan.groups),
        "drain_timeout_s": settings.drain_timeout_s,
        "max_request_s": settings.drain_timeout_s,
        "directory_timeout_s": settings.placement_timeout_s + settings.start_timeout_s,
    }


def _sequences(number: int) -> int:
    if number > MAX_SEQUENCES:
        raise ConfigError(
            f"{number} sequences are more than the {MAX_SEQUENCES} that can be served: plan a smaller batch"
        )
    return number


def _word(words: dict[str, str], name: str, value: str) -> str:
    if value not in words:
        raise ConfigError(f"{name}={value} of the plan cannot be served: plan with one of {', '.join(words)}")
    return words[value]
