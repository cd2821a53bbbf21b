"""What an operator sees of experts that are cut: slices with numbers of their own, through a real admin port."""

import grpc
import pytest

from llama4_dist.client.admin import AdminClient
from llama4_dist.v1 import cluster_pb2, cluster_pb2_grpc, experts_pb2, experts_pb2_grpc
from tests.cluster.memory_control import MemoryControl


@pytest.fixture
def control() -> MemoryControl:
    return MemoryControl(num_slices=2)


def test_the_placement_names_every_slice(channel: grpc.Channel, client: AdminClient, control: MemoryControl) -> None:
    placement = experts_pb2_grpc.ExpertServiceStub(channel).GetPlacement(experts_pb2.GetPlacementRequest())
    assert (placement.num_experts, placement.num_slices) == (8, 2)
    assert (placement.expert_bytes, placement.slice_bytes) == (100, 50)
    names = [(one.layer, one.expert, one.slice) for one in placement.experts]
    assert names == [(layer, expert, index) for layer in (1, 3) for expert in range(8) for index in range(2)]
    seen = client.placement()
    assert seen.hosts_of == control.placement().hosts_of
    assert (seen.num_slices, seen.slice_bytes) == (2, 50)


def test_a_change_of_the_placement_is_told_by_slice(client: AdminClient, control: MemoryControl) -> None:
    placements = client.watch_placement()
    assert next(placements).hosts_of == control.placement().hosts_of
    control.scale(6)
    control.finish()
    assert next(placements).hosts_of == control.placement().hosts_of
    placements.close()


def test_loads_are_those_of_a_slice(client: AdminClient, control: MemoryControl) -> None:
    host = control.placement().hosts_of[3, 5][0]
    watch = client.watch_loads(interval_s=0.05)
    next(watch)
    control.add_rows(host, (3, 5), 500)
    busiest = next(watch).experts[0]
    while not busiest.rows_per_s:
        busiest = next(watch).experts[0]
    assert (busiest.host, busiest.layer, busiest.expert, busiest.slice, busiest.rows) == (host, 3, 2, 1, 500)
    watch.close()


def test_workers_and_the_cluster_say_that_experts_are_cut(channel: grpc.Channel, client: AdminClient) -> None:
    assert client.status().num_slices == 2
    found = cluster_pb2_grpc.ClusterServiceStub(channel).ListWorkers(cluster_pb2.ListWorkersRequest())
    held = [
        (layer.layer, expert, index)
        for worker in found.workers
        for layer in worker.experts
        for expert, index in zip(layer.experts, layer.slices, strict=True)
    ]
    assert sorted(held) == [(layer, expert, index) for layer in (1, 3) for expert in range(8) for index in range(2)]
