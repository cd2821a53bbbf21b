"""Turns plain classes into Ray actors: the only file with `ray.remote`. Decides nothing about experts or routing.

Ray carries calls that start, ask and stop workers; no tensor of the token loop passes through it.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.controller import CONTROLLER, ClusterPlan, Controller
from cluster.handle import Handle
from cluster.worker import Location, Role, WorkerConfig
from llama4_dist.errors import EngineError, Llama4Error, UnavailableError

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0
CONCURRENT_CALLS = 4  # a worker answers progress and status while it loads, the controller while it starts them

# Several workers share the cores of a node, so a thread that waits must soon sleep; but not at once, since the
# matrices of a decode step follow each other within microseconds. With 20000 the attention worker's threads keep
# expert hosts off the cores (benchmarks/throughput.py, 2 cores: 240 tokens/s; 255 to 275 with 100 to 2000).
# Read when torch is imported.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


class ActorHandle:
    """One actor as driver and controller see it. The driver's copy owns the actor, the controller's does not."""

    def __init__(self, worker: str, role: Role, actor: Any) -> None:
        self.worker = worker
        self.role = role
        self._actor = actor

    def call(self, method: str, *arguments: object) -> Future[Any]:
        """Call a method of the actor; the future fails with one of our errors."""
        answer: Future[Any] = Future()

        def copy(remote: Future[Any]) -> None:
            error = remote.exception()
            if error is None:
                answer.set_result(remote.result())
            else:
                answer.set_exception(self._translated(error))

        self._actor.call.remote(method, *arguments).future().add_done_callback(copy)
        return answer

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        ray.kill(self._actor, no_restart=True)

    def _translated(self, error: BaseException) -> BaseException:
        if isinstance(error, RayTaskError):  # raised by the actor's own code
            cause = error.cause
            if isinstance(cause, Llama4Error | ValueError):
                return cause
            log.error("worker_failed worker=%s\n%s", self.worker, error)
            return EngineError(f"{self.worker} failed: {type(cause).__name__}; its log says why")
        if isinstance(error, RayError):
            log.warning("worker_lost worker=%s cause=%s", self.worker, str(error).splitlines()[0])
            return UnavailableError(f"the process of {self.worker} died", reason="WORKER_LOST")
        return error


class RaySpawner:
    """Creates workers in placement groups, and a controller beside the driver; `close` removes the groups.

    On nodes that offer the custom resource `llama4_expert` or `llama4_attention`, workers of that role go there only.
    `labels` maps a role to the node labels it demands.
    """

    def __init__(self, *, run_id: str, labels: Mapping[Role, Mapping[str, str]] | None = None) -> None:
        self._run_id = run_id
        self._labels = labels or {}
        self._groups: list[PlacementGroup] = []

    def spawn(self, configs: Sequence[WorkerConfig]) -> list[ActorHandle]:
        """Start workers of one role, spread over the nodes where there are several; return before they are up."""
        first = configs[0]
        bundle = worker_bundle(first, ray.cluster_resources())
        labels = dict(self._labels.get(first.role, {}))
        group = placement_group(
            [bundle] * len(configs),
            strategy="SPREAD" if num_alive_nodes() > 1 else "PACK",
            name=f"{self._run_id}-{first.worker}",
            bundle_label_selector=[labels] * len(configs) if labels else None,
        )
        self._groups.append(group)
        try:
            ray.get(group.ready(), timeout=PLACEMENT_TIMEOUT_S)
        except GetTimeoutError:
            raise UnavailableError(
                f"Ray has no room for {len(configs)} {first.role} workers of {bundle} with labels {labels}: "
                f"the nodes offer {ray.cluster_resources()}",
                reason="INSUFFICIENT_CAPACITY",
            ) from None
        return [self._spawn_one(config, bundle, group, index) for index, config in enumerate(configs)]

    def spawn_controller(self, plan: ClusterPlan, workers: Sequence[Handle]) -> ActorHandle:
        """Start the controller on the driver's node, where it takes no CPU of Ray's; return before it is up."""
        actor = (
            ACTORS[Role.CONTROLLER]
            .options(
                name=f"{self._run_id}-{CONTROLLER}",
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(this_node().node, soft=True),
                max_restarts=0,
                max_concurrency=CONCURRENT_CALLS,
            )
            .remote(plan, workers)
        )
        return ActorHandle(CONTROLLER, Role.CONTROLLER, actor)

    def close(self) -> None:
        """Remove the placement groups, and with them any actor that is left."""
        while self._groups:
            remove_placement_group(self._groups.pop())

    def _spawn_one(
        self, config: WorkerConfig, bundle: Mapping[str, float], group: PlacementGroup, index: int
    ) -> ActorHandle:
        threads = str(config.num_threads)
        actor = (
            ACTORS[config.role]
            .options(
                name=f"{self._run_id}-{config.worker}",
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                resources={name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                max_restarts=0,
                max_concurrency=CONCURRENT_CALLS,
                runtime_env={"env_vars": THREAD_ENVIRONMENT | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
            )
            .remote(config)
        )
        return ActorHandle(config.worker, config.role, actor)


def worker_bundle(config: WorkerConfig, cluster_resources: Mapping[str, float]) -> dict[str, float]:
    """Return the Ray resources one worker holds: its threads, a GPU if it computes there, its role's own resource."""
    bundle: dict[str, float] = {"CPU": config.num_threads}
    if config.device.startswith("cuda"):
        bundle["GPU"] = 1
    if (resource := f"llama4_{config.role}") in cluster_resources:
        bundle[resource] = 1
    return bundle


def num_alive_nodes() -> int:
    """Count the nodes of the cluster that live."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def this_node() -> Location:
    """Say where this process runs, in Ray's words."""
    return Location(node=ray.get_runtime_context().get_node_id(), address=ray.util.get_node_ip_address())


def log_to_stderr() -> None:
    """Log a worker's events to its stderr, which Ray keeps in a file of the session, one per process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


class Actor:
    """A plain class in a process of its own.

    Its module is imported when it is built. Ray loads the actor's class wherever a handle to it arrives, and with the
    plain class would come torch: the controller's process does without.
    """

    plain: Any

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the plain class."""
        return getattr(self.plain, method)(*arguments)


@ray.remote
class ExpertHostActor(Actor):
    """An expert host in a Ray actor."""

    def __init__(self, config: WorkerConfig) -> None:
        from cluster.expert_host import ExpertHost

        log_to_stderr()
        self.plain = ExpertHost(config, this_node())


@ray.remote
class AttentionWorkerActor(Actor):
    """An attention worker in a Ray actor."""

    def __init__(self, config: WorkerConfig) -> None:
        from cluster.attention_worker import AttentionWorker

        log_to_stderr()
        self.plain = AttentionWorker(config, this_node())


@ray.remote
class ControllerActor(Actor):
    """The controller in a Ray actor."""

    def __init__(self, plan: ClusterPlan, workers: Sequence[Handle]) -> None:
        log_to_stderr()
        self.plain = Controller(plan, workers, this_node())


ACTORS: Mapping[Role, Any] = {
    Role.EXPERT: ExpertHostActor,
    Role.ATTENTION: AttentionWorkerActor,
    Role.CONTROLLER: ControllerActor,
}
