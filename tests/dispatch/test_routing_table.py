"""The routing table: checked once, immutable, maskable."""

import pytest

from llama4_dist.dispatch.routing_table import Replica, RoutingTable, SliceRef
from tests.dispatch.fakes import cut, whole


def ref(host: str, start: int, stop: int, incarnation: int = 0) -> SliceRef:
    return SliceRef(host=host, incarnation=incarnation, start=start, stop=stop)


def test_without_masks_every_replica_that_touches_the_host() -> None:
    table = RoutingTable(
        epoch=3, replicas={(0, 0): whole("a", "b"), (0, 1): (cut("a", "c"), *whole("b")), (1, 0): whole("a")}
    )
    masked = table.without("a")
    assert masked.replicas == {(0, 0): whole("b"), (0, 1): whole("b"), (1, 0): ()}
    assert (masked.epoch, masked.hosts) == (3, frozenset({"b"}))
    assert table.hosts == frozenset({"a", "b", "c"})


def test_a_table_cannot_be_written_to() -> None:
    table = RoutingTable(epoch=0, replicas={(0, 0): whole("a")})
    with pytest.raises(TypeError):
        table.replicas[0, 1] = whole("b")  # type: ignore[index]
    with pytest.raises(AttributeError):
        table.epoch = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "slices",
    [
        (),
        (ref("a", 1, 4),),
        (ref("a", 0, 4), ref("b", 5, 8)),
        (ref("a", 0, 4), ref("b", 3, 8)),
        (ref("a", 0, 4), ref("a", 4, 8)),
    ],
    ids=["none", "late-start", "gap", "overlap", "same-host"],
)
def test_a_replica_covers_the_width_once(slices: tuple[SliceRef, ...]) -> None:
    with pytest.raises(ValueError):
        Replica(slices)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (4, 2), (-1, 2)])
def test_a_slice_is_not_empty(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="empty or reversed"):
        ref("a", start, stop)


@pytest.mark.parametrize(
    "replicas",
    [
        {(0, 0): whole("a"), (0, 1): (Replica((ref("a", 0, 4, incarnation=1),)),)},
        {(0, 0): (Replica((ref("a", 0, 4),)), Replica((ref("b", 0, 8),)))},
        {(0, 0): (cut("a", "b"), cut("b", "a"))},
        {(-1, 0): whole("a")},
    ],
    ids=["two-lives", "widths", "two-ranges", "negative-layer"],
)
def test_a_contradictory_table_is_refused(replicas: dict[tuple[int, int], tuple[Replica, ...]]) -> None:
    with pytest.raises(ValueError):
        RoutingTable(epoch=0, replicas=replicas)
