"""ExpertService through a real port: who holds what, how busy it is, and how both change."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from llama4_dist.client.admin import AdminClient
from llama4_dist.client.admin_experts import Loads
from llama4_dist.errors import InvalidRequestError
from llama4_dist.rpc import status
from llama4_dist.v1 import experts_pb2, experts_pb2_grpc
from tests.cluster.memory_control import MemoryControl

SHORT_S = 0.05


@pytest.fixture
def stub(channel: grpc.Channel) -> experts_pb2_grpc.ExpertServiceStub:
    return experts_pb2_grpc.ExpertServiceStub(channel)


def holder(control: MemoryControl, pair: tuple[int, int]) -> str:
    return control.placement().hosts_of[pair][0]


def total(loads: Loads, pair: tuple[int, int]) -> float:
    return sum(one.rows_per_s for one in loads.experts if (one.layer, one.expert) == pair)


def test_the_placement_is_the_control_planes(client: AdminClient, control: MemoryControl) -> None:
    placement = client.placement()
    assert (placement.epoch, placement.num_experts, placement.expert_bytes) == (1, 8, 100)
    assert placement.moe_layers == (1, 3)
    assert placement.hosts_of == control.placement().hosts_of


def test_loads_are_measured_over_a_window(client: AdminClient, control: MemoryControl) -> None:
    host = holder(control, (3, 2))
    watch = client.watch_loads(interval_s=SHORT_S)
    idle = next(watch)
    assert total(idle, (3, 2)) == 0
    assert len(idle.experts) == 16, "experts without a row are listed too"
    control.add_rows(host, (3, 2), 500)
    busy = next(watch)
    while not total(busy, (3, 2)):
        busy = next(watch)
    assert total(busy, (3, 2)) == pytest.approx(500 / busy.window_s, rel=0.5)
    assert (busy.experts[0].host, busy.experts[0].layer, busy.experts[0].expert) == (host, 3, 2), "the busiest first"
    assert busy.experts[0].rows == 500
    assert {one.host for one in busy.hosts} == {f"expert-{index}" for index in range(4)}
    watch.close()


def test_a_window_is_as_long_as_asked_and_finds_its_rows(client: AdminClient, control: MemoryControl) -> None:
    assert client.loads(window_s=0.2).window_s >= 0.2
    control.add_rows(holder(control, (1, 0)), (1, 0), 100)
    later = client.loads(window_s=0.2)
    while not total(later, (1, 0)):  # the end of a window may be a quarter of it old
        later = client.loads(window_s=0.2)
    assert total(later, (1, 0)) == pytest.approx(100 / later.window_s, rel=0.1)


def test_a_host_that_starts_anew_never_shows_a_negative_or_huge_rate(
    client: AdminClient, control: MemoryControl
) -> None:
    host = holder(control, (1, 1))
    control.add_rows(host, (1, 1), 1_000_000)
    watch = client.watch_loads(interval_s=SHORT_S)
    next(watch)
    control.restart(host)
    control.add_rows(host, (1, 1), 10)
    for _ in range(3):
        assert 0 <= total(next(watch), (1, 1)) <= 10 / SHORT_S
    watch.close()


def test_loads_are_narrowed_by_layer_and_host(client: AdminClient) -> None:
    assert {one.layer for one in client.loads(window_s=SHORT_S, layer=3).experts} == {3}
    of_host = client.loads(window_s=SHORT_S, host="expert-1")
    assert {one.host for one in of_host.experts} == {"expert-1"}
    assert [one.host for one in of_host.hosts] == ["expert-1"]
    assert client.loads(window_s=SHORT_S, layer=77).experts == ()


def test_loads_come_in_pages(stub: experts_pb2_grpc.ExpertServiceStub) -> None:
    seen: list[tuple[str, int, int]] = []
    token = ""
    for _ in range(4):
        answer = stub.ListExpertLoads(
            experts_pb2.ListExpertLoadsRequest(window=Duration(nanos=50_000_000), page_size=5, page_token=token)
        )
        seen += [(one.host, one.layer, one.expert) for one in answer.loads]
        token = answer.next_page_token
        if not token:
            break
    assert len(answer.hosts) == 4
    assert (len(seen), len(set(seen)), seen) == (16, 16, sorted(seen))


def test_top_k_keeps_the_busiest(client: AdminClient, control: MemoryControl) -> None:
    for expert in range(8):
        control.add_rows(holder(control, (1, expert)), (1, expert), 1)
    watch = client.watch_loads(interval_s=SHORT_S, top_k=2)
    assert len(next(watch).experts) == 2
    control.add_rows(holder(control, (1, 5)), (1, 5), 100)
    busiest = next(watch).experts[0]
    while not busiest.rows_per_s:
        busiest = next(watch).experts[0]
    assert (busiest.layer, busiest.expert) == (1, 5)
    watch.close()


def test_bad_numbers_are_named(stub: experts_pb2_grpc.ExpertServiceStub) -> None:
    for call, field in (
        (lambda: stub.ListExpertLoads(experts_pb2.ListExpertLoadsRequest(window=Duration(seconds=61))), "window"),
        (lambda: stub.ListExpertLoads(experts_pb2.ListExpertLoadsRequest(window=Duration())), "window"),
        (lambda: stub.ListExpertLoads(experts_pb2.ListExpertLoadsRequest(page_size=-1)), "page_size"),
        (lambda: next(stub.WatchExpertLoads(experts_pb2.WatchExpertLoadsRequest(top_k=-1))), "top_k"),
        (
            lambda: next(stub.WatchExpertLoads(experts_pb2.WatchExpertLoadsRequest(interval=Duration(nanos=1)))),
            "interval",
        ),
        (lambda: next(stub.WatchPlacement(experts_pb2.WatchPlacementRequest(start_revision=-1))), "start_revision"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        error = status.from_rpc_error(refused.value)
        assert isinstance(error, InvalidRequestError)
        assert error.violations[0].field == field


def test_a_watched_placement_comes_whole_and_then_as_changes(
    client: AdminClient, control: MemoryControl, stub: experts_pb2_grpc.ExpertServiceStub
) -> None:
    raw = stub.WatchPlacement(experts_pb2.WatchPlacementRequest())
    placements = client.watch_placement()
    assert next(raw).WhichOneof("event") == "snapshot"
    assert next(placements).hosts_of == control.placement().hosts_of
    before = control.placement()
    control.scale(6)
    control.finish()
    event = next(raw)
    assert (event.revision, event.WhichOneof("event"), event.delta.base_revision) == (2, "delta", 1)
    moved = {(one.layer, one.expert) for one in event.delta.changed}
    assert moved == {pair for pair, hosts in control.placement().hosts_of.items() if hosts != before.hosts_of[pair]}
    after = next(placements)
    assert (after.epoch, after.hosts_of) == (2, control.placement().hosts_of)
    raw.cancel()
    placements.close()


def test_a_watch_goes_on_from_the_revision_the_caller_has(
    control: MemoryControl, stub: experts_pb2_grpc.ExpertServiceStub
) -> None:
    next(stub.WatchPlacement(experts_pb2.WatchPlacementRequest()))
    control.scale(6)
    control.finish()
    behind = next(stub.WatchPlacement(experts_pb2.WatchPlacementRequest(start_revision=1)))
    assert (behind.WhichOneof("event"), behind.revision, behind.delta.base_revision) == ("delta", 2, 1)
    stranger = next(stub.WatchPlacement(experts_pb2.WatchPlacementRequest(start_revision=99)))
    assert (stranger.WhichOneof("event"), stranger.revision) == ("snapshot", 2)
    current = stub.WatchPlacement(experts_pb2.WatchPlacementRequest(start_revision=2))
    control.scale(5)
    control.finish()
    event = next(current)
    assert (event.WhichOneof("event"), event.revision, event.delta.base_revision) == ("delta", 3, 2)
    current.cancel()
