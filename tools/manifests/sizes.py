"""Checks that what an overlay runs is what its plan says: pods, GPUs, memory, settings and the generated files."""

import re
from collections.abc import Iterator
from typing import Any

from llama4_dist.deploy.overlay_file import OverlaySettings, read_overlay
from llama4_dist.deploy.patches import GPU_RESOURCE
from llama4_dist.deploy.pods import CPU_SHARE
from llama4_dist.deploy.render import SETTINGS, stale
from tools.manifests.commands import settings_of
from tools.manifests.objects import Object, Overlay

_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def check_sizes(overlay: Overlay) -> Iterator[str]:
    """Yield every difference between the plan and what would run."""
    if difference := stale(overlay.folder):
        yield f"{overlay.folder} is stale: run `llama4-dist deploy render`\n{difference}"
    (cluster,) = overlay.of("RayCluster")
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    plan, attention, experts = overlay.plan, groups["attention"], groups["experts"]
    yield from _equal("attention groups", attention["replicas"], plan.groups)
    yield from _equal("pods of an attention group", attention["numOfHosts"], plan.stages)
    yield from _equal("expert hosts", experts["replicas"], plan.hosts)
    gpus = 0 if plan.on_cpu else 1
    yield from _equal("GPUs of an attention pod", gpus_of(attention), plan.ranks * gpus)
    yield from _equal("GPUs of an expert pod", gpus_of(experts), plan.devices_per_host * gpus)
    most = sum(group["maxReplicas"] * group["numOfHosts"] * gpus_of(group) for group in groups.values())
    if most > plan.num_devices:
        yield f"{most} GPUs may be asked for and the plan's hardware has {plan.num_devices}"
    for group in groups.values():
        yield from _memory(overlay, group)
    yield from _settings(overlay, read_overlay(overlay.folder / SETTINGS))


def gpus_of(group: Object) -> int:
    """Return the GPUs of one pod of a worker group."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return int(limits.get(GPU_RESOURCE, 0))


def quantity(given: str | int) -> int:
    """Read a quantity of memory in bytes."""
    found = re.fullmatch(r"([0-9]+)([KMGT]i)?", str(given))
    if found is None:
        raise ValueError(f"{given!r} is no whole quantity with a binary unit")
    return int(found[1]) * _UNITS[found[2] or ""]


def _memory(overlay: Overlay, group: Object) -> Iterator[str]:
    name, plan, spec = group["groupName"], overlay.plan, group["template"]["spec"]
    limit = quantity(spec["containers"][0]["resources"]["limits"]["memory"])
    held = plan.attention_bytes if name == "attention" else plan.expert_bytes
    if plan.on_cpu and limit < held * CPU_SHARE:
        yield f"{name}: a pod holds {held} bytes by the plan and may have {limit}"
    (shm,) = (volume for volume in spec["volumes"] if volume["name"] == "shm")
    if quantity(shm["emptyDir"]["sizeLimit"]) >= limit:
        yield f"{name}: /dev/shm counts as the pod's memory and may fill all {limit} bytes of it"
    if group["minReplicas"] > group["replicas"] or group["replicas"] > group["maxReplicas"]:
        yield f"{name}: replicas {group['replicas']} lie outside minReplicas and maxReplicas"


def _settings(overlay: Overlay, wanted: OverlaySettings) -> Iterator[str]:
    plan = overlay.plan
    for pod in overlay.pods():
        for container in pod.containers:
            settings = settings_of(overlay, pod, container)
            if settings is None:
                continue
            yield from _equal(f"{pod.name}: model", str(settings.model), str(wanted.model_dir))
            if settings.experts:
                yield from _equal("expert hosts served", settings.experts, plan.hosts)
                yield from _equal("attention workers served", settings.attention, plan.groups)
                yield from _equal("copies", settings.replicas, plan.replicas)
                yield from _equal("context", settings.max_context, plan.context)


def _equal(what: str, found: Any, planned: Any) -> Iterator[str]:
    if found != planned:
        yield f"{what}: {found}, and {planned} by the plan"
