"""The cluster's records ⇄ messages of llama4_dist.v1 and google.longrunning; pure, and knows no control plane."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import timestamp_pb2
from google.rpc import code_pb2, status_pb2

from cluster.admin.paging import seconds
from cluster.operation import Change, ChangeOptions, ClusterView, Operation, Phase
from cluster.planning.placement import Pair
from cluster.worker import WorkerStatus
from llama4_dist.dispatch.units import slice_of
from llama4_dist.errors import Llama4Error
from llama4_dist.rpc import status
from llama4_dist.v1 import cluster_pb2
from llama4_dist.validation import check_request_id

MAX_DRAIN_TIMEOUT_S = 3600.0
MAX_WARNINGS = 100


def worker_to_proto(worker: WorkerStatus, *, num_slices: int, with_experts: bool) -> cluster_pb2.Worker:
    """Write a process; `with_experts` lists every pair, which takes thousands of numbers for a large model."""
    return cluster_pb2.Worker(
        worker=worker.worker,
        role=f"WORKER_ROLE_{worker.role.name}",
        state=f"WORKER_STATE_{worker.state.name}",
        incarnation=worker.incarnation,
        pid=worker.pid,
        node=worker.node,
        addresses=worker.addresses,
        epoch=worker.epoch,
        num_experts=len(worker.experts),
        memory_bytes=worker.memory_bytes,
        experts=layers_to_proto(worker.experts, num_slices) if with_experts else (),
        group=worker.group,
        stage=worker.stage,
        rank=worker.rank,
        first_layer=worker.layers[0],
        num_layers=worker.layers[1] - worker.layers[0],
        formation=worker.formation,
    )


def layers_to_proto(pairs: Iterable[Pair], num_slices: int) -> list[cluster_pb2.LayerExperts]:
    """Write pairs layer by layer."""
    layers = []
    for layer, group in groupby(sorted(pairs), key=lambda pair: pair[0]):
        held = [slice_of(unit, num_slices) for _, unit in group]
        slices = [one.slice_index for one in held] if num_slices > 1 else ()
        layers.append(cluster_pb2.LayerExperts(layer=layer, experts=[one.expert for one in held], slices=slices))
    return layers


def cluster_to_proto(view: ClusterView) -> cluster_pb2.Cluster:
    """Write the cluster."""
    return cluster_pb2.Cluster(
        model=view.model,
        epoch=view.epoch,
        num_replicas=view.num_replicas,
        workers=[worker_to_proto(worker, num_slices=view.num_slices, with_experts=False) for worker in view.workers],
        operation=view.operation,
        num_slices=view.num_slices,
    )


def options_from_proto(request: Any) -> ChangeOptions:
    """Read what the three requests of a change have in common."""
    if request.request_id:
        check_request_id(request.request_id)
    given = request.drain_timeout if request.HasField("drain_timeout") else None
    default_s = ChangeOptions().drain_timeout_s
    return ChangeOptions(
        request_id=request.request_id,
        validate_only=request.validate_only,
        drain_timeout_s=seconds("drain_timeout", given, default=default_s, least=0.0, most=MAX_DRAIN_TIMEOUT_S),
    )


def operation_to_proto(operation: Operation, *, validate_only: bool = False) -> operations_pb2.Operation:
    """Write an operation; one that only plans is done as soon as it answers."""
    done = operation.phase.final or validate_only
    written = operations_pb2.Operation(name=operation.name, done=done)
    written.metadata.Pack(metadata_to_proto(operation))
    if not done:
        return written
    if operation.phase in (Phase.FAILED, Phase.CANCELLED):
        written.error.CopyFrom(error_to_proto(operation))
    else:
        written.response.Pack(change_to_proto(operation.change or Change(hosts_before=0, hosts_after=0)))
    return written


def metadata_to_proto(operation: Operation) -> cluster_pb2.OperationMetadata:
    """Write how an operation is going."""
    return cluster_pb2.OperationMetadata(
        kind=f"OPERATION_KIND_{operation.kind.name}",
        phase=f"OPERATION_PHASE_{operation.phase.name}",
        progress_percent=int(operation.progress * 100),
        change=change_to_proto(operation.change) if operation.change is not None else None,
        hosts_ready=operation.hosts_ready,
        moves_done=operation.moves_done,
        bytes_moved=operation.bytes_done,
        paused_ms=operation.paused_s * 1000,
        epoch=operation.epoch,
        warnings=[
            status_pb2.Status(message=status.clip(warning, status.MAX_MESSAGE_CHARS))
            for warning in operation.warnings[:MAX_WARNINGS]
        ],
        create_time=to_timestamp(operation.started_s),
        end_time=to_timestamp(operation.ended_s) if operation.ended_s is not None else None,
        request_id=operation.request_id,
    )


def change_to_proto(change: Change) -> cluster_pb2.ClusterChange:
    """Write a plan."""
    return cluster_pb2.ClusterChange(
        hosts_before=change.hosts_before,
        hosts_after=change.hosts_after,
        added_hosts=change.added,
        removed_hosts=change.removed,
        freed_nodes=change.freed_nodes,
        num_moves=change.num_moves,
        num_bytes=change.num_bytes,
        balance_before=change.balance_before,
        balance_after=change.balance_after,
    )


def error_to_proto(operation: Operation) -> status_pb2.Status:
    """Write how an operation failed. An operator reads the whole message: it is the log of a change."""
    if operation.phase is Phase.CANCELLED:
        reason, message = operation.error_reason or "CANCELLED", operation.error_message or "cancelled and undone"
        code = code_pb2.CANCELLED
    else:
        reason, message = operation.error_reason or Llama4Error.reason, operation.error_message or "failed"
        code = status.code_of_reason(reason).value[0]
    written = status_pb2.Status(code=code, message=status.clip(message, status.MAX_MESSAGE_CHARS))
    written.details.extend(status.pack(detail) for detail in status.details_of(Llama4Error(message, reason=reason)))
    return written


def to_timestamp(unix_s: float) -> timestamp_pb2.Timestamp:
    """Write a time of the Unix clock."""
    written = timestamp_pb2.Timestamp()
    written.FromNanoseconds(round(unix_s * 1e9))
    return written
