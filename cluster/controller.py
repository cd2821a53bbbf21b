"""Brings a cluster up and knows its workers: plans the placement, lets them load, publishes the topology.

Knows neither Ray nor torch: workers are spoken to through `Handle.call`, and belong to the driver. Nothing here is on
the path of a token; a controller that dies costs the cluster its ability to change, not its tokens.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.handle import PROGRESS_INTERVAL_S, Handle, results, settled
from cluster.placement import ExpertGeometry, HostSlot, Placement, place
from cluster.worker import HostAddress, LoadProgress, Location, Role, State, Topology, WorkerConfig, WorkerStatus
from llama4_dist.errors import ConfigError

log = logging.getLogger(__name__)

CONTROLLER = "controller"  # its worker id
STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What to start: the workers, and the experts they share out. `host_capacity_bytes` None = no limit."""

    geometry: ExpertGeometry
    experts: tuple[WorkerConfig, ...]
    attention: tuple[WorkerConfig, ...]
    num_replicas: int = 1
    host_capacity_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.experts or not self.attention:
            raise ConfigError(
                f"num_expert_hosts={len(self.experts)}, num_attention_workers={len(self.attention)}: "
                "a cluster needs one of each"
            )


class Controller:
    """The workers of one cluster. `start` returns when every attention worker serves; it ends none that fail."""

    def __init__(self, plan: ClusterPlan, workers: Sequence[Handle], location: Location) -> None:
        self._plan = plan
        self._location = location
        self._experts = [worker for worker in workers if worker.role is Role.EXPERT]
        self._attention = [worker for worker in workers if worker.role is Role.ATTENTION]
        self.incarnation = time.time_ns() // 1_000_000
        self._state = State.NEW
        self._epoch = 0
        self._progress: dict[str, LoadProgress] = {}

    def start(self, timeout_s: float) -> tuple[str, ...]:
        """Place, load, publish epoch 1 and open the engine services, within `timeout_s`; return their addresses."""
        deadline = time.monotonic() + timeout_s
        self._state = State.LOADING
        placement = self._place(self._ask(self._experts, "location", deadline=deadline))
        hosts = self._load(placement, deadline)
        self._publish(placement, hosts, deadline)
        addresses = tuple(self._ask(self._attention, "serve", deadline=deadline).values())
        self._progress |= self._ask([*self._experts, *self._attention], "progress", deadline=deadline)
        self._state = State.READY
        return addresses

    def progress(self) -> tuple[LoadProgress, ...]:
        """Say how far each worker was when last asked; may be called while `start` runs."""
        return tuple(self._progress.values())

    def status(self) -> tuple[WorkerStatus, ...]:
        """Describe the controller and every worker; one that does not answer is LOST."""
        answers = {worker: worker.call("status") for worker in (*self._experts, *self._attention)}
        wait(answers.values(), timeout=STATUS_TIMEOUT_S)
        return (
            self._own_status(),
            *(
                answer.result()
                if answer.done() and answer.exception() is None
                else WorkerStatus(worker=worker.worker, role=worker.role, state=State.LOST)
                for worker, answer in answers.items()
            ),
        )

    def _own_status(self) -> WorkerStatus:
        return WorkerStatus(
            worker=CONTROLLER,
            role=Role.CONTROLLER,
            state=self._state,
            incarnation=self.incarnation,
            pid=os.getpid(),
            node=self._location.node,
            epoch=self._epoch,
            memory_bytes=psutil.Process().memory_info().rss,
        )

    def _place(self, places: Mapping[str, Location]) -> Placement:
        capacity = self._plan.host_capacity_bytes
        slots = [
            HostSlot(host=worker, node=location.node, capacity_bytes=capacity) for worker, location in places.items()
        ]
        try:
            return place(self._plan.geometry, slots, num_replicas=self._plan.num_replicas)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _load(self, placement: Placement, deadline: float) -> dict[str, HostAddress]:
        """Let all workers load at once and note how far they are meanwhile."""
        loads = {worker: worker.call("load") for worker in self._attention}
        loads |= {worker: worker.call("load", placement.held_by(worker.worker)) for worker in self._experts}
        while not settled(loads, PROGRESS_INTERVAL_S) and time.monotonic() < deadline:
            asked = [worker.call("progress") for worker, load in loads.items() if not load.done()]
            for answer in wait(asked, timeout=PROGRESS_INTERVAL_S).done:
                if answer.exception() is None:
                    self._progress[answer.result().worker] = answer.result()
        addresses = results(loads, deadline, doing="load")
        return {worker.worker: addresses[worker.worker] for worker in self._experts}

    def _publish(self, placement: Placement, hosts: Mapping[str, HostAddress], deadline: float) -> None:
        self._epoch += 1
        topology = Topology(epoch=self._epoch, placement=placement, hosts=hosts)
        self._ask(self._attention, "publish", topology, deadline=deadline)
        log.info("topology_published epoch=%d hosts=%d", self._epoch, len(hosts))

    def _ask(self, workers: Sequence[Handle], method: str, *arguments: object, deadline: float) -> dict[str, Any]:
        return results({worker: worker.call(method, *arguments) for worker in workers}, deadline, doing=method)
