"""ClusterService and Operations through a real port: what an operator asks, and every way it is refused."""

import threading

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from cluster.admin.cluster_wire import operation_to_proto
from cluster.admin.settings import AdminSettings
from cluster.operation import Kind, Operation, Phase
from cluster.worker import Role, State
from llama4_dist.client.admin import AdminClient
from llama4_dist.errors import (
    ConflictError,
    DeadlineExceededError,
    DuplicateRequestError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from llama4_dist.rpc import status
from llama4_dist.v1 import cluster_pb2, cluster_pb2_grpc
from tests.cluster.admin_serving import ONCE, Served, admin_serving
from tests.cluster.memory_control import MemoryControl


def test_the_cluster_is_described_as_it_is(client: AdminClient, control: MemoryControl) -> None:
    cluster = client.status()
    assert (cluster.model, cluster.epoch, cluster.num_replicas, cluster.operation) == ("models/memory", 1, 1, "")
    assert [worker.role for worker in cluster.workers] == ["controller", "attention", *["expert"] * 4]
    expert = cluster.workers[2]
    assert (expert.worker, expert.state, expert.pid, expert.addresses) == (
        "expert-0",
        "ready",
        100,
        ("unix:/run/expert-0",),
    )
    assert sum(worker.num_experts for worker in cluster.workers) == 16
    assert cluster.num_hosts == 4


def test_workers_come_in_pages_with_what_they_hold(channel: grpc.Channel, control: MemoryControl) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    names: list[str] = []
    token = ""
    for _ in range(2):
        answer = stub.ListWorkers(
            cluster_pb2.ListWorkersRequest(role=cluster_pb2.WORKER_ROLE_EXPERT, page_size=2, page_token=token)
        )
        assert len(answer.workers) == 2
        names += [worker.worker for worker in answer.workers]
        token = answer.next_page_token
    assert names == ["expert-0", "expert-1", "expert-2", "expert-3"]
    assert token == ""
    held = {(layer.layer, expert) for layer in answer.workers[1].experts for expert in layer.experts}
    assert held == set(control._placement.held_by("expert-3"))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (cluster_pb2.ListWorkersRequest(page_size=-1), "page_size"),
        (cluster_pb2.ListWorkersRequest(page_size=1001), "page_size"),
        (cluster_pb2.ListWorkersRequest(page_token="expert-77"), "page_token"),
    ],
)
def test_a_page_that_cannot_be_is_refused(
    channel: grpc.Channel, request_: cluster_pb2.ListWorkersRequest, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        cluster_pb2_grpc.ClusterServiceStub(channel).ListWorkers(request_)
    error = status.from_rpc_error(refused.value)
    assert isinstance(error, InvalidRequestError)
    assert [violation.field for violation in error.violations] == [field]


def test_a_scale_goes_through_its_phases_to_the_change_it_planned(client: AdminClient, control: MemoryControl) -> None:
    begun = client.scale(6)
    assert (begun.kind, begun.phase, begun.done, begun.progress) == ("scale", "planning", False, 0.0)
    assert begun.change is not None
    assert (begun.change.hosts_before, begun.change.hosts_after) == (4, 6)
    assert begun.change.added == ("expert-4", "expert-5")
    assert client.status().operation == begun.name
    seen = []
    while not (now := client.operation(begun.name)).done:
        seen.append(now.phase)
        control.advance()
    assert seen == ["planning", "provisioning", "loading", "verifying", "committing", "draining"]
    assert (now.phase, now.progress, now.error_reason) == ("done", 1.0, "")
    assert (now.moves_done, now.bytes_done) == (begun.change.num_moves, begun.change.num_bytes)
    assert (now.paused_s, now.epoch, now.warnings, now.hosts_ready) == (0.0025, 2, ("one link was slow",), 2)
    assert now.ended_s is not None
    assert now.ended_s >= now.started_s > 1e9
    assert client.status().num_hosts == 6


def test_an_operation_is_packed_as_its_proto_says(channel: grpc.Channel, control: MemoryControl) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    operation = stub.ScaleExpertPool(cluster_pb2.ScaleExpertPoolRequest(target_hosts=2, request_id="r1"))
    metadata = cluster_pb2.OperationMetadata()
    assert operation.metadata.Unpack(metadata)
    assert metadata.kind == cluster_pb2.OPERATION_KIND_SCALE
    assert metadata.request_id == "r1"
    assert operation.WhichOneof("result") is None
    control.finish()
    done = operations_pb2_grpc.OperationsStub(channel).GetOperation(
        operations_pb2.GetOperationRequest(name=operation.name)
    )
    change = cluster_pb2.ClusterChange()
    assert done.done
    assert done.response.Unpack(change)
    assert (change.hosts_before, change.hosts_after, list(change.removed_hosts)) == (4, 2, ["expert-2", "expert-3"])


@pytest.mark.parametrize("target", [0, -1, 70_000])
def test_a_number_of_hosts_that_cannot_be_is_an_invalid_argument(client: AdminClient, target: int) -> None:
    with pytest.raises(InvalidRequestError, match="target_hosts"):
        client.scale(target)
    assert client.operations() == ()


def test_what_a_change_lacks_is_named(channel: grpc.Channel) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    long, negative = Duration(seconds=100_000), Duration(seconds=-1)
    for method, request, field in (
        (stub.ScaleExpertPool, cluster_pb2.ScaleExpertPoolRequest(), "target_hosts"),
        (stub.ScaleExpertPool, cluster_pb2.ScaleExpertPoolRequest(target_hosts=3, request_id="a b"), "request_id"),
        (stub.ScaleExpertPool, cluster_pb2.ScaleExpertPoolRequest(target_hosts=3, drain_timeout=long), "drain_timeout"),
        (stub.RebalanceExperts, cluster_pb2.RebalanceExpertsRequest(drain_timeout=negative), "drain_timeout"),
        (stub.DrainWorker, cluster_pb2.DrainWorkerRequest(), "worker"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            method(request)
        error = status.from_rpc_error(refused.value)
        assert isinstance(error, InvalidRequestError)
        assert error.violations[0].field == field


def test_an_unknown_worker_is_not_found(client: AdminClient) -> None:
    with pytest.raises(NotFoundError, match="expert-9"):
        client.drain("expert-9")
    drained = client.drain("expert-1")
    assert drained.change is not None
    assert drained.change.removed == ("expert-1",)


def test_a_second_change_is_aborted_and_told_the_first(channel: grpc.Channel, client: AdminClient) -> None:
    first = client.scale(6)
    for change in (lambda: client.scale(5), client.rebalance, lambda: client.drain("expert-0")):
        with pytest.raises(ConflictError) as refused:
            change()
        assert refused.value.metadata["operation"] == first.name
    with pytest.raises(grpc.RpcError) as raw:
        cluster_pb2_grpc.ClusterServiceStub(channel).RebalanceExperts(cluster_pb2.RebalanceExpertsRequest())
    assert raw.value.code() is grpc.StatusCode.ABORTED
    details = operations_status(raw.value)
    resource = status.find(details, error_details_pb2.ResourceInfo())
    assert (resource.resource_type, resource.resource_name) == ("google.longrunning.Operation", first.name)


def operations_status(error: grpc.RpcError) -> status_pb2.Status:
    found = status_pb2.Status()
    (details,) = [one.value for one in error.trailing_metadata() if one.key == status.DETAILS_KEY]
    found.ParseFromString(details)
    return found


def test_what_cannot_be_is_a_failed_precondition_with_its_reason(client: AdminClient, channel: grpc.Channel) -> None:
    with pytest.raises(PreconditionError, match="room for 1 to 8"):
        client.scale(9)
    with pytest.raises(grpc.RpcError) as raw:
        cluster_pb2_grpc.ClusterServiceStub(channel).ScaleExpertPool(cluster_pb2.ScaleExpertPoolRequest(target_hosts=9))
    assert raw.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    failure = status.find(operations_status(raw.value), error_details_pb2.PreconditionFailure())
    assert failure.violations[0].subject == "nodes"


def test_the_same_number_of_hosts_is_no_error(client: AdminClient, control: MemoryControl) -> None:
    begun = client.scale(4)
    assert control.finish() is Phase.DONE
    change = client.operation(begun.name).change
    assert change is not None
    assert (change.num_moves, change.added, change.removed) == (0, (), ())


def test_a_repeated_request_finds_the_first_ones_operation(client: AdminClient, control: MemoryControl) -> None:
    first = client.scale(6, request_id="once")
    assert client.scale(6, request_id="once").name == first.name
    control.finish()
    again = client.scale(6, request_id="once")
    assert (again.name, again.done) == (first.name, True)
    with pytest.raises(DuplicateRequestError):
        client.scale(5, request_id="once")
    assert len(client.operations()) == 1


def test_a_dry_run_plans_and_changes_nothing(client: AdminClient, control: MemoryControl) -> None:
    planned = client.scale(6, validate_only=True)
    assert planned.done
    assert not planned.failed
    assert planned.change is not None
    assert planned.change.num_moves > 0
    assert client.operations() == ()
    assert client.status().num_hosts == 4
    with pytest.raises(PreconditionError):
        client.scale(9, validate_only=True)


def test_operations_come_newest_first_and_in_pages(
    client: AdminClient, control: MemoryControl, channel: grpc.Channel
) -> None:
    begun = []
    for target in (5, 4, 3, 4, 5):
        begun.append(client.scale(target).name)
        control.finish()
    assert [operation.name for operation in client.operations()] == begun[::-1]
    stub = operations_pb2_grpc.OperationsStub(channel)
    first = stub.ListOperations(operations_pb2.ListOperationsRequest(page_size=3))
    second = stub.ListOperations(
        operations_pb2.ListOperationsRequest(name="operations", page_size=3, page_token=first.next_page_token)
    )
    assert [operation.name for operation in (*first.operations, *second.operations)] == begun[::-1]
    assert second.next_page_token == ""
    for bad in (
        operations_pb2.ListOperationsRequest(name="models"),
        operations_pb2.ListOperationsRequest(filter="done=true"),
        operations_pb2.ListOperationsRequest(page_token="operations/999"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListOperations(bad)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_wait_ends_with_the_operation(client: AdminClient, control: MemoryControl) -> None:
    control.by_itself = True
    seen: list[str] = []
    ended = client.wait(client.scale(6).name, timeout_s=20, on_progress=lambda now: seen.append(now.phase))
    assert (ended.phase, seen[-1]) == ("done", "done")


def test_a_wait_ends_with_its_time_too(client: AdminClient, channel: grpc.Channel) -> None:
    name = client.scale(6).name
    stub = operations_pb2_grpc.OperationsStub(channel)
    now = stub.WaitOperation(operations_pb2.WaitOperationRequest(name=name, timeout=Duration(nanos=50_000_000)))
    assert not now.done
    now = stub.WaitOperation(operations_pb2.WaitOperationRequest(name=name), timeout=1.0)
    assert not now.done, "the answer comes before the caller's own deadline"
    with pytest.raises(DeadlineExceededError, match="it goes on"):
        client.wait(name, timeout_s=0.1)
    with pytest.raises(grpc.RpcError) as refused:
        stub.WaitOperation(operations_pb2.WaitOperationRequest(name=name, timeout=Duration(seconds=-1)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_cancelled_operation_ends_with_code_cancelled(
    client: AdminClient, control: MemoryControl, channel: grpc.Channel
) -> None:
    name = client.scale(6).name
    control.advance()
    client.cancel(name)
    client.cancel(name)
    assert client.operation(name).phase == "rolling_back"
    assert control.finish() is Phase.CANCELLED
    ended = operations_pb2_grpc.OperationsStub(channel).GetOperation(operations_pb2.GetOperationRequest(name=name))
    assert ended.done
    assert ended.error.code == code_pb2.CANCELLED
    operation = client.operation(name)
    assert (operation.phase, operation.failed, operation.error_reason) == ("cancelled", True, "CANCELLED")
    assert client.status().num_hosts == 4


def test_a_failed_operation_says_why(client: AdminClient, control: MemoryControl, channel: grpc.Channel) -> None:
    control.failure = "expert-4 ended while it loaded"
    name = client.scale(6).name
    assert control.finish() is Phase.FAILED
    operation = client.operation(name)
    assert (operation.done, operation.error_reason, operation.error_message) == (True, "WORKER_LOST", control.failure)
    raw = operations_pb2_grpc.OperationsStub(channel).GetOperation(operations_pb2.GetOperationRequest(name=name))
    assert raw.error.code == code_pb2.ABORTED


def test_an_ended_operation_can_be_forgotten_and_a_running_one_not(client: AdminClient, control: MemoryControl) -> None:
    name = client.scale(6).name
    with pytest.raises(PreconditionError, match="is running"):
        client.delete(name)
    control.finish()
    client.delete(name)
    assert client.operations() == ()


def test_an_unknown_operation_is_not_found_and_a_nameless_one_invalid(client: AdminClient) -> None:
    for method in (client.operation, client.cancel, client.delete, client.wait):
        with pytest.raises(NotFoundError, match="operations/77"):
            method("operations/77")
        with pytest.raises(InvalidRequestError, match="name"):
            method("")


def test_an_absent_controller_is_unavailable_with_a_time_to_come_back(
    client: AdminClient, control: MemoryControl
) -> None:
    control.away = True
    asked = [
        client.status,
        client.placement,
        client.loads,
        client.operations,
        lambda: client.scale(5),
        lambda: next(client.watch()),
        lambda: next(client.watch_loads(interval_s=0.05)),
        lambda: next(client.watch_placement()),
    ]
    for method in asked:
        with pytest.raises(UnavailableError) as refused:
            method()
        assert (refused.value.reason, refused.value.retry_after_s) == ("CONTROLLER_LOST", 1.0)


def test_a_client_finds_the_controller_again(served: Served, control: MemoryControl) -> None:
    control.away = True
    came_back = threading.Timer(0.3, lambda: setattr(control, "away", False))
    came_back.start()
    with AdminClient(served.address) as patient:
        assert patient.scale(6).kind == "scale"
    came_back.join()


def test_a_change_whose_answer_was_lost_is_found_and_not_begun_twice(served: Served, control: MemoryControl) -> None:
    control.loses_answer = True
    with AdminClient(served.address) as patient:
        assert patient.scale(6).name == control.operations()[0].name
    assert len(control.operations()) == 1


def test_a_controller_that_hangs_is_given_up_and_holds_up_nobody_else() -> None:
    control = MemoryControl()
    control.blocked = threading.Event()
    try:
        with admin_serving(control, AdminSettings(call_timeout_s=0.3, num_threads=2)) as served:
            with AdminClient(served.address, ONCE) as client:
                for _ in range(3):  # more than there are threads
                    with pytest.raises(UnavailableError, match="gave no answer"):
                        client.status()
                with pytest.raises(InvalidRequestError):
                    client.scale(0)
            control.blocked.set()
            with AdminClient(served.address) as patient:
                assert patient.status().num_hosts == 4
    finally:
        control.blocked.set()


def test_a_watch_shows_every_change_and_nothing_else(client: AdminClient, control: MemoryControl) -> None:
    views = client.watch()
    assert next(views).operation == ""
    name = client.scale(6).name
    assert next(views).operation == name
    control.finish()
    after = next(views)
    assert (after.num_hosts, after.epoch, after.operation) == (6, 2, "")


def test_a_watch_counts_revisions_and_gives_signs_of_life(channel: grpc.Channel, control: MemoryControl) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    events = stub.WatchCluster(cluster_pb2.WatchClusterRequest(heartbeat=Duration(nanos=100_000_000)))
    first = next(events)
    assert (first.revision, first.WhichOneof("event")) == (1, "cluster")
    beat = next(events)
    assert (beat.revision, beat.WhichOneof("event")) == (1, "heartbeat")
    assert beat.heartbeat.time.seconds > 1e9
    control.scale(6)
    while (event := next(events)).WhichOneof("event") == "heartbeat":
        pass
    assert event.revision == 2
    events.cancel()
    with pytest.raises(grpc.RpcError) as refused:
        next(stub.WatchCluster(cluster_pb2.WatchClusterRequest(heartbeat=Duration(nanos=1))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_many_watchers_cost_one_reading(control: MemoryControl) -> None:
    slow = AdminSettings(watch_interval_s=0.5)
    with admin_serving(control, slow) as served, AdminClient(served.address, ONCE) as client:
        watchers = [client.watch() for _ in range(40)]
        for watcher in watchers:
            next(watcher)
        control.scale(6)
        for watcher in watchers:
            next(watcher)
        assert control.num_views < 40, "each watcher saw two views; alone each would have read twice"
        for watcher in watchers:
            watcher.close()


def test_a_watch_ends_with_a_reason_when_the_server_closes(control: MemoryControl) -> None:
    with admin_serving(control) as served:
        client = AdminClient(served.address, ONCE)
        views = client.watch()
        next(views)
    with pytest.raises(UnavailableError) as ended:
        next(views)
    assert ended.value.reason == "DRAINING"
    client.close()


def test_every_word_of_the_records_has_a_value_on_the_wire() -> None:
    for role in Role:
        assert f"WORKER_ROLE_{role.name}" in cluster_pb2.WorkerRole.keys()  # noqa: SIM118 (no mapping)
    for state in State:
        assert f"WORKER_STATE_{state.name}" in cluster_pb2.WorkerState.keys()  # noqa: SIM118 (as above)
    for kind in Kind:
        for phase in Phase:
            packed = operation_to_proto(Operation(name="operations/1", kind=kind, phase=phase))
            assert packed.done == phase.final
