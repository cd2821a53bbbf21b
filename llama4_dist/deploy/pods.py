"""How large the pods of a plan are and how many of them there are: a pure function, with each allowance stated."""

from dataclasses import dataclass

from llama4_dist.deploy.overlay_file import OverlaySettings
from llama4_dist.deploy.plan_file import DeployPlan

GIB = 1 << 30
# Allowances, none of them measured on a cluster: the interpreter, torch, CUDA's context and buffers of rows …
PROCESS_BYTES = 2 * GIB
# … per GPU, for pinned buffers and what the page cache needs to stream a checkpoint; weights do not stay in memory
GPU_HOST_BYTES = 16 * GIB
# … on processors, over what the plan counts: activations and the pages of files that are read
CPU_SHARE = 1.25
# Ray's store, which holds no tensor of ours; and where ranks reduce, NCCL's and gloo's segments.
STORE_BYTES = GIB // 4
EXPERT_THREADS = 1  # of a host, as cluster/ray_engine.py starts it
REDUCE_BYTES = GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PodGroup:
    """`replicas` units of `pods` pods each (KubeRay's numOfHosts); the rest is of one pod."""

    replicas: int
    max_replicas: int
    pods: int
    gpus: int
    cores: int
    ray_cores: int  # what Ray may place there: no more than the role takes, so that nobody else's worker comes
    memory_bytes: int
    shm_bytes: int
    places: int  # of the role's Ray resource

    @property
    def num_pods(self) -> int:
        return self.replicas * self.pods


def attention_group(plan: DeployPlan, settings: OverlaySettings) -> PodGroup:
    """A pod is a stage, so its ranks share a node; a unit is a group, whose pods come and go together."""
    leader = 1 if plan.stages * plan.ranks > 1 else 0  # without layers: it plans, samples and talks to gateways
    cores = settings.attention_cores * plan.ranks + leader
    shm = STORE_BYTES + (REDUCE_BYTES * plan.ranks if plan.ranks > 1 else 0)
    return PodGroup(
        replicas=plan.groups,
        max_replicas=plan.groups,
        pods=plan.stages,
        gpus=0 if plan.on_cpu else plan.ranks,
        cores=cores,
        ray_cores=cores,
        memory_bytes=_memory(plan, plan.attention_bytes, plan.ranks) + _up(shm),
        shm_bytes=shm,
        places=plan.ranks,
    )


def expert_group(plan: DeployPlan, settings: OverlaySettings) -> PodGroup:
    """A pod is an expert host: the unit that is added, drained and lost."""
    return PodGroup(
        replicas=plan.hosts,
        max_replicas=plan.hosts + plan.spare_hosts,
        pods=1,
        gpus=0 if plan.on_cpu else plan.devices_per_host,
        cores=settings.expert_cores * plan.devices_per_host,
        ray_cores=EXPERT_THREADS,
        memory_bytes=_memory(plan, plan.expert_bytes, plan.devices_per_host) + _up(STORE_BYTES),
        shm_bytes=STORE_BYTES,
        places=1,
    )


def _memory(plan: DeployPlan, device_bytes: int, num_devices: int) -> int:
    if plan.on_cpu:
        return _up(PROCESS_BYTES + int(device_bytes * num_devices * CPU_SHARE))
    return PROCESS_BYTES + GPU_HOST_BYTES * num_devices


def _up(count: int) -> int:
    """Round up to whole GiB."""
    return -(-count // GIB) * GIB
