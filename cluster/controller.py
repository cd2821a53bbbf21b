"""Brings a cluster up and knows its workers: plans the placement, starts workers, publishes the topology.

Knows no Ray: workers come from a `Spawner` and are spoken to through `Handle.call`. Nothing here is on the path of a
token; a controller that dies costs the cluster its ability to change, not its tokens.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.placement import ExpertGeometry, HostSlot, Placement, place
from cluster.worker import HostAddress, LoadProgress, Location, Role, State, Topology, WorkerConfig, WorkerStatus
from llama4_dist.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
PROGRESS_INTERVAL_S = 0.25

OnProgress = Callable[[LoadProgress], None]


class Handle(Protocol):
    """A worker, wherever it runs."""

    worker: str
    role: Role

    def call(self, method: str, *arguments: object) -> Future[Any]: ...
    def kill(self) -> None: ...


class Spawner(Protocol):
    """Where workers come from."""

    def spawn(self, configs: Sequence[WorkerConfig]) -> Sequence[Handle]: ...
    def close(self) -> None: ...


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
    """The workers of one cluster. `start` returns when every attention worker serves, or raises and leaves nothing."""

    def __init__(self, plan: ClusterPlan, spawner: Spawner, *, progress: OnProgress | None = None) -> None:
        self._plan = plan
        self._spawner = spawner
        self._progress = progress or (lambda event: None)
        self._handles: dict[str, Handle] = {}
        self._epoch = 0
        self.engine_addresses: tuple[str, ...] = ()

    def start(self, *, timeout_s: float) -> None:
        """Spawn, load, publish epoch 1 and open the engine services, within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        try:
            experts, attention = self._spawn(self._plan.experts), self._spawn(self._plan.attention)
            places: Mapping[str, Location] = self._ask(experts, "location", deadline=deadline)
            placement = self._place(places)
            hosts = self._load(experts, attention, placement, deadline)
            self._publish(attention, placement, hosts, deadline)
            self.engine_addresses = tuple(self._ask(attention, "serve", deadline=deadline).values())
            for event in self._ask([*experts, *attention], "progress", deadline=deadline).values():
                self._progress(event)
        except BaseException:
            self.close()
            raise

    def status(self) -> tuple[WorkerStatus, ...]:
        """Ask every worker how it is; one that does not answer is LOST."""
        answers = {handle: handle.call("status") for handle in self._handles.values()}
        wait(answers.values(), timeout=STATUS_TIMEOUT_S)
        return tuple(
            answer.result()
            if answer.done() and answer.exception() is None
            else WorkerStatus(worker=handle.worker, role=handle.role, state=State.LOST)
            for handle, answer in answers.items()
        )

    def close(self) -> None:
        """Stop every worker, attention first: politely, then by force."""
        for role in (Role.ATTENTION, Role.EXPERT):
            wait([h.call("close") for h in self._handles.values() if h.role is role], timeout=CLOSE_TIMEOUT_S)
        for handle in self._handles.values():
            handle.kill()
        self._handles.clear()
        self._spawner.close()

    def _spawn(self, configs: Sequence[WorkerConfig]) -> list[Handle]:
        handles = list(self._spawner.spawn(configs))
        for handle in handles:
            self._handles[handle.worker] = handle
            self._progress(LoadProgress(worker=handle.worker, role=handle.role, state=State.NEW))
        return handles

    def _place(self, places: Mapping[str, Location]) -> Placement:
        capacity = self._plan.host_capacity_bytes
        slots = [
            HostSlot(host=worker, node=location.node, capacity_bytes=capacity) for worker, location in places.items()
        ]
        try:
            return place(self._plan.geometry, slots, num_replicas=self._plan.num_replicas)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _load(
        self, experts: Sequence[Handle], attention: Sequence[Handle], placement: Placement, deadline: float
    ) -> dict[str, HostAddress]:
        """Let all workers load at once and report how far they are meanwhile."""
        loads = {handle: handle.call("load") for handle in attention}
        loads |= {handle: handle.call("load", placement.held_by(handle.worker)) for handle in experts}
        while not settled(loads, PROGRESS_INTERVAL_S) and time.monotonic() < deadline:
            asked = [handle.call("progress") for handle, load in loads.items() if not load.done()]
            for answer in wait(asked, timeout=PROGRESS_INTERVAL_S).done:
                if answer.exception() is None:
                    self._progress(answer.result())
        addresses = results(loads, deadline, doing="load")
        return {handle.worker: addresses[handle.worker] for handle in experts}

    def _publish(
        self, attention: Sequence[Handle], placement: Placement, hosts: Mapping[str, HostAddress], deadline: float
    ) -> None:
        self._epoch += 1
        topology = Topology(epoch=self._epoch, placement=placement, hosts=hosts)
        self._ask(attention, "publish", topology, deadline=deadline)
        log.info("topology_published epoch=%d hosts=%d", self._epoch, len(hosts))

    def _ask(self, handles: Sequence[Handle], method: str, *arguments: object, deadline: float) -> dict[str, Any]:
        return results({handle: handle.call(method, *arguments) for handle in handles}, deadline, doing=method)


def settled(calls: Mapping[Handle, Future[Any]], timeout_s: float) -> bool:
    """Wait a little; say whether all calls are done or one failed."""
    done, pending = wait(calls.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    return not pending or any(call.exception() for call in done)


def results(calls: Mapping[Handle, Future[Any]], deadline: float, *, doing: str) -> dict[str, Any]:
    """Return the answers by worker, or raise the first failure as soon as it happens."""
    timeout_s = max(0.0, deadline - time.monotonic())
    done, pending = wait(calls.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for call in done:
        if (error := call.exception()) is not None:
            raise error
    if pending:
        late = sorted(handle.worker for handle, call in calls.items() if call in pending)
        raise UnavailableError(f"workers {', '.join(late)} did not {doing} in time: see their logs")
    return {handle.worker: call.result() for handle, call in calls.items()}
