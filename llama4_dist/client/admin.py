"""The blocking client of an admin server; needs neither torch nor Ray, and knows nothing of inference."""

import time
import uuid
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from llama4_dist.client.admin_experts import (
    Loads,
    Placement,
    changed_placement,
    expert_loads,
    host_loads,
    placement_from_proto,
)
from llama4_dist.client.admin_results import Cluster, Operation, cluster_from_proto, operation_from_proto
from llama4_dist.client.options import ConnectOptions, channel_credentials, channel_options
from llama4_dist.client.retry import Attempts
from llama4_dist.errors import DeadlineExceededError, EngineError
from llama4_dist.rpc import status
from llama4_dist.v1 import cluster_pb2, cluster_pb2_grpc, experts_pb2, experts_pb2_grpc

WAIT_SLICE_S = 0.5  # how long one WaitOperation call waits, so that progress is seen


def duration(seconds: float | None) -> Duration | None:
    """Write a duration; None stays None, an absent field."""
    if seconds is None:
        return None
    written = Duration()
    written.FromNanoseconds(round(seconds * 1e9))
    return written


class AdminClient:
    """Calls an admin server at "host:port". Every method raises the errors of `llama4_dist.errors`.

    Unavailability is retried as the server asks. A change whose request id is not given draws one, so a retry finds the
    operation it repeats instead of beginning another.
    """

    def __init__(self, address: str, options: ConnectOptions | None = None) -> None:
        self._options = options or ConnectOptions()
        arguments = channel_options(self._options)
        self._channel = (
            grpc.secure_channel(address, channel_credentials(self._options), arguments)
            if self._options.uses_tls
            else grpc.insecure_channel(address, arguments)
        )
        self._cluster: Any = cluster_pb2_grpc.ClusterServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._experts: Any = experts_pb2_grpc.ExpertServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._operations: Any = operations_pb2_grpc.OperationsStub(self._channel)

    def __enter__(self) -> "AdminClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; operations go on."""
        self._channel.close()

    def status(self) -> Cluster:
        """Describe the cluster and every process of it."""
        return cluster_from_proto(self._call(self._cluster.GetCluster, cluster_pb2.GetClusterRequest()))

    def watch(self, *, heartbeat_s: float | None = None) -> Generator[Cluster, None, None]:
        """Yield the cluster now and after every change; raises when the server or the controller goes away."""
        request = cluster_pb2.WatchClusterRequest(heartbeat=duration(heartbeat_s))
        for event in self._stream(self._cluster.WatchCluster, request):
            if event.HasField("cluster"):
                yield cluster_from_proto(event.cluster)

    def placement(self) -> Placement:
        """Say who holds what."""
        return placement_from_proto(self._call(self._experts.GetPlacement, experts_pb2.GetPlacementRequest()))

    def watch_placement(self) -> Generator[Placement, None, None]:
        """Yield the placement now and after every change."""
        seen: Placement | None = None
        for event in self._stream(self._experts.WatchPlacement, experts_pb2.WatchPlacementRequest()):
            if event.HasField("snapshot"):
                seen = placement_from_proto(event.snapshot)
            elif seen is not None and event.delta.base_revision == seen.epoch:
                seen = changed_placement(seen, event.delta.changed, event.revision)
            else:
                raise EngineError(f"the server sent a change of revision {event.delta.base_revision}, never seen here")
            yield seen

    def loads(self, *, window_s: float | None = None, layer: int | None = None, host: str = "") -> Loads:
        """Measure loads over a window; `layer` and `host` narrow it down."""
        experts: list[Any] = []
        token = ""
        while True:
            request = experts_pb2.ListExpertLoadsRequest(
                window=duration(window_s), layer=layer, host=host, page_token=token
            )
            found = self._call(self._experts.ListExpertLoads, request)
            experts.extend(found.loads)
            token = found.next_page_token
            if not token:
                break
        return Loads(
            window_s=found.window.ToNanoseconds() / 1e9, hosts=host_loads(found.hosts), experts=expert_loads(experts)
        )

    def watch_loads(self, *, interval_s: float | None = None, top_k: int = 0) -> Generator[Loads, None, None]:
        """Yield the loads of every interval, the busiest experts first; only `top_k` of them unless 0."""
        request = experts_pb2.WatchExpertLoadsRequest(interval=duration(interval_s), top_k=top_k)
        for event in self._stream(self._experts.WatchExpertLoads, request):
            yield Loads(
                window_s=event.window.ToNanoseconds() / 1e9,
                hosts=host_loads(event.hosts),
                experts=expert_loads(event.loads),
            )

    def scale(
        self,
        num_hosts: int,
        *,
        request_id: str = "",
        validate_only: bool = False,
        drain_timeout_s: float | None = None,
    ) -> Operation:
        """Begin to bring the expert pool to `num_hosts`."""
        request = cluster_pb2.ScaleExpertPoolRequest(
            target_hosts=num_hosts,
            validate_only=validate_only,
            request_id=request_id or uuid.uuid4().hex,
            drain_timeout=duration(drain_timeout_s),
        )
        return operation_from_proto(self._call(self._cluster.ScaleExpertPool, request))

    def rebalance(
        self, *, request_id: str = "", validate_only: bool = False, drain_timeout_s: float | None = None
    ) -> Operation:
        """Begin to move experts by load."""
        request = cluster_pb2.RebalanceExpertsRequest(
            validate_only=validate_only,
            request_id=request_id or uuid.uuid4().hex,
            drain_timeout=duration(drain_timeout_s),
        )
        return operation_from_proto(self._call(self._cluster.RebalanceExperts, request))

    def drain(
        self, worker: str, *, request_id: str = "", validate_only: bool = False, drain_timeout_s: float | None = None
    ) -> Operation:
        """Begin to empty one expert host and end it."""
        request = cluster_pb2.DrainWorkerRequest(
            worker=worker,
            validate_only=validate_only,
            request_id=request_id or uuid.uuid4().hex,
            drain_timeout=duration(drain_timeout_s),
        )
        return operation_from_proto(self._call(self._cluster.DrainWorker, request))

    def operations(self) -> tuple[Operation, ...]:
        """List operations, newest first."""
        found: list[Operation] = []
        token = ""
        while True:
            request = operations_pb2.ListOperationsRequest(name="operations", page_token=token)
            page = self._call(self._operations.ListOperations, request)
            found.extend(operation_from_proto(one) for one in page.operations)
            token = page.next_page_token
            if not token:
                return tuple(found)

    def operation(self, name: str) -> Operation:
        """Return one operation; NotFoundError."""
        request = operations_pb2.GetOperationRequest(name=name)
        return operation_from_proto(self._call(self._operations.GetOperation, request))

    def wait(
        self,
        name: str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[Operation], None] = lambda operation: None,
    ) -> Operation:
        """Return the operation when it has ended, however it ended; DeadlineExceededError if it has not in time."""
        deadline_s = time.monotonic() + timeout_s if timeout_s is not None else None
        while True:
            left_s = deadline_s - time.monotonic() if deadline_s is not None else WAIT_SLICE_S
            if left_s <= 0:
                raise DeadlineExceededError(f"{name} has not ended after {timeout_s} s: it goes on")
            request = operations_pb2.WaitOperationRequest(name=name, timeout=duration(min(left_s, WAIT_SLICE_S)))
            operation = operation_from_proto(self._call(self._operations.WaitOperation, request))
            on_progress(operation)
            if operation.done:
                return operation

    def cancel(self, name: str) -> None:
        """Ask an operation to roll back; it may still end as done."""
        self._call(self._operations.CancelOperation, operations_pb2.CancelOperationRequest(name=name))

    def delete(self, name: str) -> None:
        """Forget an operation that has ended."""
        self._call(self._operations.DeleteOperation, operations_pb2.DeleteOperationRequest(name=name))

    def _call(self, method: Any, request: Any) -> Any:
        attempts = Attempts(self._options, None)
        while True:
            try:
                return method(request, timeout=attempts.remaining_s, metadata=self._options.metadata)
            except grpc.RpcError as failure:
                delay_s = attempts.delay_s(failure, begun=False)
            time.sleep(delay_s)

    def _stream(self, method: Any, request: Any) -> Iterator[Any]:
        call = method(request, metadata=self._options.metadata)
        try:
            yield from call
        except grpc.RpcError as failure:
            raise status.from_rpc_error(failure) from None
        finally:
            call.cancel()
