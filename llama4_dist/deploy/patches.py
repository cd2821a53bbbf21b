"""The patches of Kubernetes objects that follow from a plan; as JSON patches, since KubeRay's lists have no keys."""

from typing import Any

from llama4_dist.deploy.overlay_file import OverlaySettings
from llama4_dist.deploy.plan_file import DeployPlan
from llama4_dist.deploy.pods import PodGroup, attention_group, expert_group

MIB = 1 << 20
GPU_RESOURCE = "nvidia.com/gpu"
PROBE_PERIOD_S = 10  # as in base/driver.yaml and base/gateway.yaml
PRE_STOP_S = 10  # as in base/gateway.yaml
MARGIN_S = 20
Patch = list[dict[str, Any]]


def cluster_patch(plan: DeployPlan, settings: OverlaySettings) -> Patch:
    """Return the patch of the RayCluster; it fails where the base's groups are not in the order it was written for."""
    groups = (("attention", attention_group(plan, settings)), ("experts", expert_group(plan, settings)))
    return [operation for index, (name, group) in enumerate(groups) for operation in _group(index, name, group)]


def budget_patch(group: PodGroup) -> Patch:
    """Let one unit go at a time. A number, because a RayCluster has no scale subresource to count a share of."""
    return [{"op": "replace", "path": "/spec/minAvailable", "value": max(0, group.num_pods - group.pods)}]


def driver_patch(settings: OverlaySettings) -> Patch:
    """Let the start-up probe wait as long as pods may take to come and weights to be loaded."""
    return [_startup(settings)]


def gateway_patch(settings: OverlaySettings) -> Patch:
    """Let a gateway end its longest stream before it is killed, and wait at its start for the cluster."""
    grace_s = PRE_STOP_S + settings.drain_timeout_s + MARGIN_S
    return [
        _startup(settings),
        {"op": "replace", "path": "/spec/template/spec/terminationGracePeriodSeconds", "value": grace_s},
    ]


def _startup(settings: OverlaySettings) -> dict[str, Any]:
    periods = -(-(settings.placement_timeout_s + settings.start_timeout_s + MARGIN_S) // PROBE_PERIOD_S)
    path = "/spec/template/spec/containers/0/startupProbe/failureThreshold"
    return {"op": "replace", "path": path, "value": periods}


def _group(index: int, name: str, group: PodGroup) -> Patch:
    at = f"/spec/workerGroupSpecs/{index}"
    role = {"attention": "llama4_attention", "experts": "llama4_expert"}[name]
    values: dict[str, Any] = {
        f"{at}/replicas": group.replicas,
        f"{at}/minReplicas": group.replicas,
        f"{at}/maxReplicas": group.max_replicas,
        f"{at}/numOfHosts": group.pods,
        f"{at}/resources": _ray_resources(role, group),
        f"{at}/template/spec/containers/0/resources": _pod_resources(group),
        f"{at}/template/spec/volumes/0/emptyDir/sizeLimit": f"{group.shm_bytes // MIB}Mi",
    }
    tests = [
        {"op": "test", "path": f"{at}/groupName", "value": name},
        {"op": "test", "path": f"{at}/template/spec/volumes/0/name", "value": "shm"},
    ]
    return [*tests, *({"op": "replace", "path": path, "value": value} for path, value in values.items())]


def _ray_resources(role: str, group: PodGroup) -> dict[str, str]:
    offered = {"CPU": str(group.ray_cores), role: str(group.places)}
    return offered | ({"GPU": str(group.gpus)} if group.gpus else {})


def _pod_resources(group: PodGroup) -> dict[str, dict[str, str]]:
    wanted = {"cpu": str(group.cores), "memory": f"{group.memory_bytes // MIB}Mi"}
    gpus = {GPU_RESOURCE: str(group.gpus)} if group.gpus else {}
    return {"requests": wanted | gpus, "limits": wanted | gpus}
