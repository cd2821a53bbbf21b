"""What of Ray one worker holds, and with whom it shares a node; pure."""

from collections.abc import Mapping

from cluster.worker import Role, WorkerConfig

LEADER_CPU = 0.1  # of an attention group: it plans and samples, and holds no layer


def worker_bundle(
    config: WorkerConfig, cluster_resources: Mapping[str, float], *, demand_role: bool = False
) -> dict[str, float]:
    """Return the Ray resources one worker holds: its threads, a GPU if it computes there, its role's own resource.

    Members of an attention group hold what attention workers do; their leader computes nothing and needs little.
    """
    if config.leads:
        return {"CPU": LEADER_CPU}
    bundle: dict[str, float] = {"CPU": config.num_threads}
    if config.device.startswith("cuda"):
        bundle["GPU"] = 1
    if (resource := f"llama4_{pool_of(config)}") in cluster_resources or demand_role:
        bundle[resource] = 1
    return bundle


def pool_of(config: WorkerConfig) -> Role:
    """Return whose nodes a worker goes to: members of attention groups go where attention workers would."""
    return Role.ATTENTION if config.role is Role.STAGE else config.role


def stage_of(config: WorkerConfig) -> tuple[str, int]:
    """Name the stage that a member belongs to; all else is of the stage without a name."""
    return config.group, config.stage
