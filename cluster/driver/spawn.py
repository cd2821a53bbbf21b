"""Starts and ends workers on Ray, each in a placement group of its own. Decides nothing about experts or routing."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.driver.actor_handle import HEAD, HEAD_TIMEOUT_S, ActorHandle
from cluster.driver.actors import ACTORS, this_node
from cluster.driver.nodes import Node, emptiest
from cluster.driver.worker_bundle import pool_of, stage_of, worker_bundle
from cluster.handle import Handle
from cluster.plan import ClusterPlan
from cluster.standing import CONTROLLER
from cluster.worker import Role, WorkerConfig
from llama4_dist.errors import UnavailableError

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0  # for room on any node, unless another is given
NODE_TIMEOUT_S = 5.0  # for room on the node we chose
NODE_LABEL = "ray.io/node-id"
CONCURRENT_CALLS = 8  # a worker answers progress and status while it loads, the controller while it starts them

# Several workers share the cores of a node, so a thread that waits must soon sleep; but not at once, since the
# matrices of a decode step follow each other within microseconds. With 20000 the attention worker's threads keep
# expert hosts off the cores (benchmarks/throughput.py, 2 cores: 240 tokens/s; 255 to 275 with 100 to 2000).
# Read when torch is imported.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


class Home(NamedTuple):
    """Where a worker lives: what it holds of Ray, on which node if we chose it, and its process once it is started.

    `stage` names a group and one of its stages, whose ranks are to live on one node.
    """

    role: Role
    stage: tuple[str, int]
    bundle: dict[str, float]
    node: str | None
    group: PlacementGroup
    handle: ActorHandle | None


class RaySpawner:
    """Creates workers, each in a placement group of its own, and a controller beside the driver.

    On nodes that offer the custom resource `llama4_expert` or `llama4_attention`, workers of that role go there only.
    With `demand_roles` they wait for such a node where none has come yet, instead of going to any. `labels` maps a role
    to the node labels it demands. For `placement_timeout_s` a worker waits for room: a node may have
    to come first.
    """

    def __init__(
        self,
        *,
        run_id: str,
        labels: Mapping[Role, Mapping[str, str]] | None = None,
        tell_autoscaler: bool = False,
        placement_timeout_s: float | None = None,
        demand_roles: bool = False,
    ) -> None:
        self._demand_roles = demand_roles
        self._run_id = run_id
        self._placement_timeout_s = PLACEMENT_TIMEOUT_S if placement_timeout_s is None else placement_timeout_s
        self._tell_autoscaler = tell_autoscaler
        self._labels = labels or {}
        self._lock = threading.Lock()
        self._homes: dict[str, Home] = {}  # by worker id
        self._num_lives: Counter[str] = Counter()

    def spawn(self, configs: Sequence[WorkerConfig]) -> list[ActorHandle]:
        """Start workers of one role, spread over the nodes where there are several; return before they are up.

        Each has a placement group of its own, so that what it held is free again when it goes.
        """
        for config in configs:
            self._reserve(config, choose_node=True)
        self._request_resources()
        if late := self._late(configs, NODE_TIMEOUT_S):
            for config in late:  # somebody else's work is there: any node will do
                self.end(config.worker)
                self._reserve(config, choose_node=False)
        if late := self._late(configs, self._placement_timeout_s):
            for config in configs:
                self.end(config.worker)
            bundle, labels = self._bundle(late[0]), self._demanded(late[0])
            raise UnavailableError(
                f"Ray has no room for {len(late)} of {len(configs)} {late[0].role} workers of {bundle} with labels "
                f"{labels}: the nodes offer {ray.cluster_resources()}",
                reason="INSUFFICIENT_CAPACITY",
            )
        return [self._spawn_one(config) for config in configs]

    def end(self, worker: str) -> None:
        """End a worker's process, whatever it is doing, and free what it held; unknown ids are no error."""
        with self._lock:
            home = self._homes.pop(worker, None)
        if home is None:
            return
        if home.handle is not None:
            home.handle.kill()
        if HEAD.answers(HEAD_TIMEOUT_S):
            remove_placement_group(home.group)
            self._request_resources()

    def spawn_controller(self, plan: ClusterPlan, workers: Sequence[Handle]) -> ActorHandle:
        """Start the controller on the driver's node, where it takes no CPU of Ray's; return before it is up."""
        actor = (
            ACTORS[Role.CONTROLLER]
            .options(
                name=self._name(CONTROLLER),
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(this_node().node, soft=True),
                max_restarts=0,
                max_concurrency=2 * CONCURRENT_CALLS,
            )
            .remote(plan, workers)
        )
        return ActorHandle(CONTROLLER, Role.CONTROLLER, actor)

    def answers(self, timeout_s: float) -> bool:
        """Tell whether the head of Ray answers in time."""
        return HEAD.answers(timeout_s)

    def close(self) -> None:
        """End what is left."""
        for worker in tuple(self._homes):
            self.end(worker)

    def _request_resources(self) -> None:
        """Tell an autoscaler of Ray what all workers need together, so that nodes come at once and may go again."""
        if self._tell_autoscaler:
            with self._lock:
                bundles = [home.bundle for home in self._homes.values()]
            request_resources(bundles=bundles)

    def _name(self, worker: str) -> str:
        """Name an actor; Ray gives the name of one that died back when it likes, so a later life gets another."""
        life = self._num_lives[worker]
        self._num_lives[worker] += 1
        return f"{self._run_id}-{worker}" + (f"-life-{life}" if life else "")

    def _reserve(self, config: WorkerConfig, *, choose_node: bool) -> None:
        """Ask for room for one worker, on the node with the fewest of its role where there are several."""
        labels, bundle = self._demanded(config), self._bundle(config)
        node = self._choose(config, bundle, labels) if choose_node else None
        wanted = labels if node is None else labels | {NODE_LABEL: node}
        group = placement_group(
            [bundle], name=f"{self._run_id}-{config.worker}", bundle_label_selector=[wanted] if wanted else None
        )
        with self._lock:
            self._homes[config.worker] = Home(config.role, stage_of(config), bundle, node, group, None)

    def _demanded(self, config: WorkerConfig) -> dict[str, str]:
        """Return the labels of the nodes that a worker may run on; a group's leader may run on any."""
        return {} if config.leads else dict(self._labels.get(pool_of(config), {}))

    def _choose(self, config: WorkerConfig, bundle: Mapping[str, float], labels: Mapping[str, str]) -> str | None:
        """Return the node of the other ranks of its stage, or the emptiest: for all ranks, if there is such a one."""
        with self._lock:
            beside = [home.node for home in self._homes.values() if config.group and home.stage == stage_of(config)]
        if beside and beside[0] is not None:
            return beside[0]
        nodes, num_ranks = self._nodes(config.role), config.partition.num_ranks
        together = {name: num_ranks * amount for name, amount in bundle.items()}
        return (emptiest(nodes, together, labels) if config.group else None) or emptiest(nodes, bundle, labels)

    def _bundle(self, config: WorkerConfig) -> dict[str, float]:
        return worker_bundle(config, ray.cluster_resources(), demand_role=self._demand_roles)

    def _late(self, configs: Sequence[WorkerConfig], timeout_s: float) -> list[WorkerConfig]:
        """Wait for the groups; return those of these workers that have no room yet."""
        ready = {self._homes[config.worker].group.ready(): config for config in configs}
        _, late = ray.wait(list(ready), num_returns=len(ready), timeout=timeout_s)
        return [ready[one] for one in late]

    def _nodes(self, role: Role) -> list[Node]:
        """Describe the live nodes, with what our workers hold there."""
        with self._lock:
            homes = list(self._homes.values())
        nodes = []
        for node in alive_nodes():
            here = [home for home in homes if home.node == node["NodeID"]]
            held: Counter[str] = Counter()
            for home in here:
                held.update(home.bundle)
            nodes.append(
                Node(
                    node=node["NodeID"],
                    offers=node["Resources"],
                    labels=node["Labels"],
                    held=held,
                    num_of_role=sum(home.role is role for home in here),
                )
            )
        return nodes

    def _spawn_one(self, config: WorkerConfig) -> ActorHandle:
        home = self._homes[config.worker]
        threads = str(config.num_threads)
        actor = (
            ACTORS[config.role]
            .options(
                name=self._name(config.worker),
                num_cpus=home.bundle["CPU"],
                num_gpus=home.bundle.get("GPU", 0),
                resources={name: amount for name, amount in home.bundle.items() if name not in ("CPU", "GPU")},
                scheduling_strategy=PlacementGroupSchedulingStrategy(home.group, placement_group_bundle_index=0),
                max_restarts=0,
                max_concurrency=CONCURRENT_CALLS,
                runtime_env={"env_vars": THREAD_ENVIRONMENT | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
            )
            .remote(config)
        )
        handle = ActorHandle(config.worker, config.role, actor)
        with self._lock:
            self._homes[config.worker] = home._replace(handle=handle)
        return handle


def alive_nodes() -> list[dict[str, Any]]:
    """List the nodes of the cluster that live, in Ray's words."""
    return [node for node in ray.nodes() if node["Alive"]]
