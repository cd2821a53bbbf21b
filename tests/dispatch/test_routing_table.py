"""The routing table: checked once, immutable, maskable."""

import pytest

from llama4_dist.dispatch.routing_table import Replica, RoutingTable
from tests.dispatch.fakes import whole


def test_without_masks_the_replicas_on_a_host() -> None:
    table = RoutingTable(
        epoch=3, num_slices=2, replicas={(0, 0): whole("a", "b"), (0, 1): whole("a", "c", "b"), (1, 0): whole("a")}
    )
    masked = table.without("a")
    assert masked.replicas == {(0, 0): whole("b"), (0, 1): whole("c", "b"), (1, 0): ()}
    assert (masked.epoch, masked.num_slices, masked.hosts) == (3, 2, frozenset({"b", "c"}))
    assert table.hosts == frozenset({"a", "b", "c"})


def test_a_table_cannot_be_written_to() -> None:
    table = RoutingTable(epoch=0, replicas={(0, 0): whole("a")})
    with pytest.raises(TypeError):
        table.replicas[0, 1] = whole("b")  # type: ignore[index]
    with pytest.raises(AttributeError):
        table.epoch = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "replicas",
    [
        {(0, 0): whole("a"), (0, 1): (Replica("a", 1),)},
        {(0, 0): whole("a", "b", "a")},
        {(-1, 0): whole("a")},
        {(0, -1): whole("a")},
    ],
    ids=["two-lives", "twice-on-a-host", "negative-layer", "negative-unit"],
)
def test_a_contradictory_table_is_refused(replicas: dict[tuple[int, int], tuple[Replica, ...]]) -> None:
    with pytest.raises(ValueError):
        RoutingTable(epoch=0, replicas=replicas)


def test_a_replica_names_its_host_and_an_expert_has_a_slice() -> None:
    with pytest.raises(ValueError, match="host is empty"):
        Replica("", 0)
    with pytest.raises(ValueError, match="num_slices=0"):
        RoutingTable(epoch=0, replicas={}, num_slices=0)
