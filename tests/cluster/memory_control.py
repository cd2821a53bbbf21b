"""A control plane in memory: real placement, real phases, real refusals; only processes and weights are missing."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.control import DEFAULT_OPTIONS
from cluster.operation import Change, ChangeOptions, ClusterView, HostLoad, Kind, Operation, Phase, PlacementView
from cluster.planning.placement import ExpertGeometry, HostSlot, Pair, Placement, place
from cluster.worker import Role, State, WorkerStatus
from llama4_dist.errors import (
    ConflictError,
    DuplicateRequestError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

MAX_HOSTS = 8
PHASES = (
    Phase.PLANNING,
    Phase.PROVISIONING,
    Phase.LOADING,
    Phase.VERIFYING,
    Phase.COMMITTING,
    Phase.DRAINING,
    Phase.DONE,
)
TOO_LATE = (Phase.COMMITTING, Phase.DRAINING)


class MemoryControl:
    """Implements `ControlPlane`. A change goes one phase on with `advance`, or by itself whenever it is looked at.

    A test breaks it: `away`, the controller is gone; `failure`, the change fails while loading; `loses_answer`, the
    next change begins and its answer does not arrive.
    """

    def __init__(
        self, num_hosts: int = 4, *, num_experts: int = 8, num_slices: int = 1, by_itself: bool = False
    ) -> None:
        self.geometry = ExpertGeometry(
            moe_layers=(1, 3), num_experts=num_experts, expert_width=8, expert_bytes=100, num_slices=num_slices,
            slice_bytes=100 // num_slices,
        )  # fmt: skip
        self.by_itself = by_itself
        self.away = False
        self.failure = ""
        self.loses_answer = False
        self.blocked: threading.Event | None = None  # calls wait for it
        self.num_views = 0
        self.num_loads = 0
        self._lock = threading.RLock()
        self._incarnations = {f"expert-{index}": 1 for index in range(num_hosts)}
        self._placement = self._place(list(self._incarnations))
        self._rows: dict[str, dict[Pair, int]] = {host: {} for host in self._incarnations}
        self._epoch = 1
        self._memory = 1000
        self._operations: list[tuple[Operation, list[str]]] = []  # oldest first, with the hosts it leads to
        self._asked: dict[str, tuple[object, str]] = {}

    def view(self) -> ClusterView:
        with self._answering():
            self.num_views += 1
            self._memory += 1  # memory never stands still
            return ClusterView(
                model="models/memory",
                epoch=self._epoch,
                num_replicas=1,
                num_slices=self.geometry.num_slices,
                workers=(
                    WorkerStatus(worker="controller", role=Role.CONTROLLER, state=State.READY, pid=10, node="node-a"),
                    WorkerStatus(
                        worker="attention-0",
                        role=Role.ATTENTION,
                        state=State.READY,
                        pid=11,
                        node="node-a",
                        incarnation=1,
                    ),
                    *(self._status(host, place) for place, host in enumerate(self._incarnations)),
                ),
                operation=self._running() or "",
            )

    def scale(self, num_hosts: int, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        with self._answering():
            if num_hosts < 1:
                raise InvalidRequestError([FieldViolation(field="num_hosts", description="must be at least 1")])
            hosts = list(self._incarnations)
            new = [name for name in (f"expert-{index}" for index in range(99)) if name not in hosts]
            wanted = hosts[:num_hosts] + new[: max(0, num_hosts - len(hosts))]
            return self._begin(Kind.SCALE, wanted, ("scale", num_hosts), options)

    def rebalance(self, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        with self._answering():
            return self._begin(Kind.REBALANCE, list(self._incarnations), "rebalance", options)

    def drain(self, worker: str, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        with self._answering():
            again = options.request_id in self._asked
            if worker not in self._incarnations and not again:
                raise NotFoundError(
                    f"there is no expert host {worker}: the cluster has {', '.join(self._incarnations)}",
                    metadata={"resource_name": worker, "resource_type": "worker"},
                )
            wanted = [host for host in self._incarnations if host != worker]
            return self._begin(Kind.DRAIN, wanted, ("drain", worker), options)

    def operations(self) -> tuple[Operation, ...]:
        with self._answering():
            return tuple(operation for operation, _ in reversed(self._operations))

    def operation(self, name: str) -> Operation:
        with self._answering():
            if self.by_itself and self._running() == name:
                self.advance()
            return self._operations[self._index(name)][0]

    def cancel(self, name: str) -> None:
        with self._answering():
            index = self._index(name)
            operation, hosts = self._operations[index]
            if not operation.phase.final and operation.phase not in TOO_LATE:
                self._operations[index] = (replace(operation, phase=Phase.ROLLING_BACK), hosts)

    def delete(self, name: str) -> None:
        with self._answering():
            index = self._index(name)
            if not self._operations[index][0].phase.final:
                raise PreconditionError(f"{name} is running: cancel it first", reason="OPERATION_RUNNING")
            del self._operations[index]

    def placement(self) -> PlacementView:
        with self._answering():
            return PlacementView(
                epoch=self._epoch,
                num_experts=self.geometry.num_experts,
                moe_layers=self.geometry.moe_layers,
                expert_bytes=self.geometry.expert_bytes,
                hosts_of=self._placement.hosts_of,
                num_slices=self.geometry.num_slices,
                slice_bytes=self.geometry.slice_bytes,
            )

    def loads(self) -> tuple[HostLoad, ...]:
        with self._answering():
            self.num_loads += 1
            return tuple(
                HostLoad(
                    host=host,
                    incarnation=incarnation,
                    at_s=time.monotonic(),
                    rows=dict(self._rows[host]),
                    bytes_held=len(self._placement.held_by(host)) * self.geometry.slice_bytes,
                )
                for host, incarnation in self._incarnations.items()
            )

    def advance(self) -> Phase:
        """Bring the running operation one phase on."""
        with self._lock:
            index = self._index(self._running() or "")
            operation, hosts = self._operations[index]
            self._operations[index] = (self._next(operation, hosts), hosts)
            return self._operations[index][0].phase

    def finish(self) -> Phase:
        """Bring the running operation to its end."""
        with self._lock:
            while not self.advance().final:
                pass
            return self._operations[-1][0].phase

    def add_rows(self, host: str, pair: Pair, rows: int) -> None:
        """Let a host have multiplied rows."""
        with self._lock:
            self._rows[host][pair] = self._rows[host].get(pair, 0) + rows

    def restart(self, host: str) -> None:
        """Let a host start anew: its counters begin at 0."""
        with self._lock:
            self._incarnations[host] += 1
            self._rows[host] = {}

    def _answering(self) -> threading.RLock:
        if self.blocked is not None:
            self.blocked.wait(30)
        if self.away:
            raise UnavailableError("the controller does not answer", reason="CONTROLLER_LOST")
        return self._lock

    def _running(self) -> str | None:
        return next((operation.name for operation, _ in self._operations if not operation.phase.final), None)

    def _index(self, name: str) -> int:
        for index, (operation, _) in enumerate(self._operations):
            if operation.name == name:
                return index
        raise NotFoundError(f"there is no operation {name}", metadata={"resource_name": name})

    def _begin(self, kind: Kind, hosts: Sequence[str], asked: object, options: ChangeOptions) -> Operation:
        if options.request_id in self._asked:
            first, name = self._asked[options.request_id]
            if first != asked:
                raise DuplicateRequestError(f"request {options.request_id} asked for another change: take another id")
            return self._operations[self._index(name)][0]
        if (running := self._running()) is not None:
            raise ConflictError(f"{running} is under way: wait for it or cancel it", metadata={"operation": running})
        if len(hosts) > MAX_HOSTS or not hosts:
            raise PreconditionError(
                f"{len(hosts)} expert hosts cannot be: the nodes have room for 1 to {MAX_HOSTS}",
                metadata={"subject": "nodes"},
            )
        change = self._change(hosts)
        name = f"operations/{len(self._asked) + len(self._operations) + 1}"
        operation = Operation(
            name=name,
            kind=kind,
            phase=Phase.PLANNING,
            request_id=options.request_id,
            change=change,
            started_s=time.time(),
        )
        if options.validate_only:
            return operation
        if options.request_id:
            self._asked[options.request_id] = (asked, name)
        self._operations.append((operation, list(hosts)))
        if self.loses_answer:
            self.loses_answer = False
            raise UnavailableError("the controller went away", retry_after_s=0.05)
        return operation

    def _change(self, hosts: Sequence[str]) -> Change:
        after = self._place(hosts)
        moves = [pair for pair, places in after.hosts_of.items() if places != self._placement.hosts_of[pair]]
        return Change(
            hosts_before=len(self._incarnations),
            hosts_after=len(hosts),
            added=tuple(host for host in hosts if host not in self._incarnations),
            removed=tuple(host for host in self._incarnations if host not in hosts),
            num_moves=len(moves),
            num_bytes=len(moves) * self.geometry.slice_bytes,
            balance_before=1.5,
            balance_after=1.25,
        )

    def _next(self, operation: Operation, hosts: Sequence[str]) -> Operation:
        change = operation.change
        assert change is not None
        if operation.phase is Phase.ROLLING_BACK:
            reason = "WORKER_LOST" if self.failure else ""
            phase = Phase.FAILED if self.failure else Phase.CANCELLED
            return replace(operation, phase=phase, ended_s=time.time(), error_reason=reason, error_message=self.failure)
        if self.failure and operation.phase is Phase.LOADING:
            return replace(operation, phase=Phase.ROLLING_BACK)
        phase = PHASES[PHASES.index(operation.phase) + 1]
        if phase is Phase.LOADING:
            return replace(operation, phase=phase, hosts_ready=len(change.added))
        if phase is Phase.VERIFYING:
            return replace(operation, phase=phase, moves_done=change.num_moves, bytes_done=change.num_bytes)
        if phase is Phase.DRAINING:
            self._switch(hosts)
            return replace(operation, phase=phase, epoch=self._epoch, paused_s=0.0025, warnings=("one link was slow",))
        return replace(operation, phase=phase, ended_s=time.time() if phase.final else None)

    def _switch(self, hosts: Sequence[str]) -> None:
        self._placement = self._place(hosts)
        self._incarnations = {host: self._incarnations.get(host, 1) for host in hosts}
        self._rows = {host: self._rows.get(host, {}) for host in hosts}
        self._epoch += 1

    def _place(self, hosts: Sequence[str]) -> Placement:
        return place(self.geometry, [HostSlot(host=host, node="node-a") for host in hosts])

    def _status(self, host: str, place_in_list: int) -> WorkerStatus:
        return WorkerStatus(
            worker=host,
            role=Role.EXPERT,
            state=State.READY,
            incarnation=self._incarnations[host],
            pid=100 + place_in_list,
            node="node-a",
            addresses=(f"unix:/run/{host}",),
            epoch=self._epoch,
            experts=self._placement.held_by(host),
            memory_bytes=self._memory,
        )
