"""What a new controller learns, and how two hosts are compared: pure parts, on records."""

import pytest

from cluster.control_plane.proofs import compare, to_prove
from cluster.control_plane.takeover import held_topology, strangers
from cluster.planning.movement import Move
from cluster.planning.placement import Placement
from cluster.worker import HostAddress, Role, State, Topology, WorkerStatus
from llama4_dist.errors import EngineError

PAIR, OTHER = (0, 1), (2, 3)


def address(host: str, incarnation: int = 1) -> HostAddress:
    return HostAddress(host=host, incarnation=incarnation, node="n", unix="unix:/x", tcp="tcp:x:1")


def status(worker: str, *pairs: tuple[int, int], state: State = State.READY, incarnation: int = 1) -> WorkerStatus:
    role = Role(worker.partition("-")[0])
    return WorkerStatus(worker=worker, role=role, state=state, incarnation=incarnation, experts=pairs)


def test_what_ready_hosts_hold_is_the_first_epoch() -> None:
    statuses = [
        status("expert-10", PAIR, OTHER),
        status("expert-2", PAIR, OTHER),
        status("expert-3"),  # holds nothing
        status("expert-4", PAIR, state=State.LOADING),
        status("expert-5", PAIR),  # listens nowhere
        status("attention-0"),
    ]
    addresses = {one.worker: address(one.worker) for one in statuses} | {"expert-5": None}
    topology = held_topology(statuses, addresses)
    assert topology.epoch == 1
    assert topology.hosts.keys() == {"expert-2", "expert-10"}
    assert topology.placement.hosts_of == {PAIR: ("expert-10", "expert-2"), OTHER: ("expert-10", "expert-2")}
    assert held_topology([], {}).epoch == 0


def test_the_first_of_equal_copies_is_spread() -> None:
    pairs = [(layer, expert) for layer in range(2) for expert in range(4)]
    statuses = [status(f"expert-{index}", *pairs) for index in range(2)]
    placed = held_topology(statuses, {one.worker: address(one.worker) for one in statuses}).placement
    assert [hosts[0] for hosts in placed.hosts_of.values()].count("expert-0") == 4


def test_strangers_are_hosts_of_another_name_or_life() -> None:
    hosts = {"expert-0": address("expert-0", 5), "expert-1": address("expert-1", 6)}
    topology = Topology(epoch=3, placement=Placement(hosts_of={}), hosts=hosts)
    answered = [
        status("expert-0", incarnation=5),
        status("expert-1", incarnation=7),
        status("expert-2", incarnation=8),
        status("attention-0"),
    ]
    assert strangers(topology, {one.worker: one for one in answered}) == {"expert-1", "expert-2"}


MOVES = (Move(pair=PAIR, source="a", target="b"), Move(pair=OTHER, source=None, target="b"))


def test_both_ends_of_a_move_are_asked() -> None:
    assert to_prove(MOVES) == {"a": {PAIR}, "b": {PAIR, OTHER}}


def test_copies_without_a_live_source_are_counted() -> None:
    assert compare(MOVES, {"a": {PAIR: "x"}, "b": {PAIR: "x", OTHER: "y"}}) == 1
    assert compare(MOVES, {"b": {PAIR: "x", OTHER: "y"}}) == 2
    assert compare(MOVES, {"a": {}, "b": {PAIR: "x", OTHER: "y"}}) == 2


@pytest.mark.parametrize(
    ("prints", "message"),
    [
        ({"a": {PAIR: "x"}, "b": {PAIR: "z", OTHER: "y"}}, "expert 1 of layer 0 differs between a and b"),
        ({"a": {PAIR: "x"}, "b": {PAIR: "x"}}, "b was to map expert 3 of layer 2"),
    ],
)
def test_a_difference_is_named(prints: dict[str, dict[tuple[int, int], str]], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        compare(MOVES, prints)
    assert caught.value.reason == "VERIFICATION_FAILED"
