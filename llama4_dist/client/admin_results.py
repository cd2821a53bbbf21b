"""A cluster and its operations as an admin server answers them, as plain data; knows no other record of them."""

from dataclasses import dataclass
from typing import Any

from google.longrunning import operations_pb2
from google.rpc import error_details_pb2

from llama4_dist.rpc import status
from llama4_dist.v1 import cluster_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A process of the cluster; `num_experts` counts the (layer, expert) pairs it holds, or slices of them.

    Where the model is cut, `group` names the leader of its attention group, `formation` how often that was formed, 0
    while it is not; a stage has `num_layers` from `first_layer` on.
    """

    worker: str
    role: str
    state: str
    incarnation: int
    pid: int
    node: str
    addresses: tuple[str, ...]
    epoch: int
    num_experts: int
    memory_bytes: int
    group: str = ""
    stage: int = 0
    rank: int = 0
    first_layer: int = 0
    num_layers: int = 0
    formation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The cluster at one moment; `operation` names the change under way, "" if none.

    Every expert is cut into `num_slices`.
    """

    model: str
    epoch: int
    num_replicas: int
    workers: tuple[Worker, ...]
    operation: str
    num_slices: int = 1

    @property
    def num_hosts(self) -> int:
        """Expert hosts that are not lost."""
        return sum(worker.role == "expert" and worker.state != "lost" for worker in self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterChange:
    """Hosts that come and go, copies that move, and what that costs and brings; a balance of 1 is even."""

    hosts_before: int
    hosts_after: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    freed_nodes: tuple[str, ...]
    num_moves: int
    num_bytes: int
    balance_before: float
    balance_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A change, now or when it ended. Times are seconds of the server's Unix clock.

    `error_reason` and `error_message` tell why it failed or was cancelled, and are "" otherwise.
    """

    name: str
    kind: str
    phase: str
    done: bool
    progress: float
    request_id: str
    change: ClusterChange | None
    started_s: float
    ended_s: float | None
    hosts_ready: int
    moves_done: int
    bytes_done: int
    paused_s: float
    epoch: int
    warnings: tuple[str, ...]
    error_reason: str
    error_message: str

    @property
    def failed(self) -> bool:
        """Whether it ended without the change: failed, or cancelled."""
        return bool(self.error_reason)


def word(enum: Any, value: int) -> str:
    """Return an enum's value in lower case without its prefix; the number where this client does not know it."""
    if value not in enum.values():
        return str(value)
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return str(enum.Name(value)).removeprefix(prefix).lower()


def cluster_from_proto(message: cluster_pb2.Cluster) -> Cluster:
    """Read the cluster."""
    return Cluster(
        model=message.model,
        epoch=message.epoch,
        num_replicas=message.num_replicas,
        workers=tuple(worker_from_proto(worker) for worker in message.workers),
        operation=message.operation,
        num_slices=message.num_slices or 1,  # an older server knows no slices
    )


def worker_from_proto(message: cluster_pb2.Worker) -> Worker:
    """Read a process."""
    return Worker(
        worker=message.worker,
        role=word(cluster_pb2.WorkerRole, message.role),
        state=word(cluster_pb2.WorkerState, message.state),
        incarnation=message.incarnation,
        pid=message.pid,
        node=message.node,
        addresses=tuple(message.addresses),
        epoch=message.epoch,
        num_experts=message.num_experts,
        memory_bytes=message.memory_bytes,
        group=message.group,
        stage=message.stage,
        rank=message.rank,
        first_layer=message.first_layer,
        num_layers=message.num_layers,
        formation=message.formation,
    )


def operation_from_proto(message: operations_pb2.Operation) -> Operation:
    """Read an operation; metadata of another type reads as empty."""
    found = cluster_pb2.OperationMetadata()
    if message.metadata.Is(found.DESCRIPTOR):
        message.metadata.Unpack(found)
    error = status.find(message.error, error_details_pb2.ErrorInfo()) if message.HasField("error") else None
    return Operation(
        name=message.name,
        kind=word(cluster_pb2.OperationKind, found.kind),
        phase=word(cluster_pb2.OperationPhase, found.phase),
        done=message.done,
        progress=1.0 if message.done and not message.HasField("error") else found.progress_percent / 100,
        request_id=found.request_id,
        change=change_from_proto(found.change) if found.HasField("change") else None,
        started_s=found.create_time.ToNanoseconds() / 1e9,
        ended_s=found.end_time.ToNanoseconds() / 1e9 if found.HasField("end_time") else None,
        hosts_ready=found.hosts_ready,
        moves_done=found.moves_done,
        bytes_done=found.bytes_moved,
        paused_s=found.paused_ms / 1000,
        epoch=found.epoch,
        warnings=tuple(warning.message for warning in found.warnings),
        error_reason=(error.reason if error is not None else "UNKNOWN") if message.HasField("error") else "",
        error_message=message.error.message,
    )


def change_from_proto(message: cluster_pb2.ClusterChange) -> ClusterChange:
    """Read a plan."""
    return ClusterChange(
        hosts_before=message.hosts_before,
        hosts_after=message.hosts_after,
        added=tuple(message.added_hosts),
        removed=tuple(message.removed_hosts),
        freed_nodes=tuple(message.freed_nodes),
        num_moves=message.num_moves,
        num_bytes=message.num_bytes,
        balance_before=message.balance_before,
        balance_after=message.balance_after,
    )
