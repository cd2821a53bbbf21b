"""Where experts go: even, distinct, within memory, deterministic."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planning.placement import ExpertGeometry, HostSlot, place, routing_table


def geometry(num_layers: int = 4, num_experts: int = 16) -> ExpertGeometry:
    return ExpertGeometry(
        moe_layers=tuple(range(0, 2 * num_layers, 2)), num_experts=num_experts, expert_width=96, expert_bytes=10
    )


def slots(num_hosts: int, num_nodes: int = 1, capacity_bytes: int | None = None) -> list[HostSlot]:
    return [
        HostSlot(host=f"expert-{i}", node=f"node-{i % num_nodes}", capacity_bytes=capacity_bytes)
        for i in range(num_hosts)
    ]


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 7, 16, 17, 40])
def test_every_layer_is_even_for_any_number_of_hosts(num_hosts: int) -> None:
    placement = place(geometry(), slots(num_hosts))
    for layer in geometry().moe_layers:
        counts = Counter(hosts[0] for (at, _), hosts in placement.hosts_of.items() if at == layer)
        per_host = [counts[slot.host] for slot in slots(num_hosts)]
        assert sum(per_host) == 16
        assert max(per_host) - min(per_host) <= 1


def test_a_host_count_that_divides_gives_whole_experts() -> None:
    held = place(geometry(), slots(4)).held_by("expert-1")
    assert {expert for _, expert in held} == {4, 5, 6, 7}
    assert len(held) == 4 * 4


@given(
    num_layers=st.integers(1, 5), num_experts=st.integers(1, 20), num_hosts=st.integers(1, 25),
    num_replicas=st.integers(1, 4), num_nodes=st.integers(1, 5),
)  # fmt: skip
def test_any_placement_is_even_and_copies_are_apart(
    num_layers: int, num_experts: int, num_hosts: int, num_replicas: int, num_nodes: int
) -> None:
    num_replicas = min(num_replicas, num_hosts)
    model, hosts = geometry(num_layers, num_experts), slots(num_hosts, num_nodes)
    placement = place(model, hosts, num_replicas=num_replicas)
    assert set(placement.hosts_of) == set(model.pairs)
    assert all(len(set(on)) == len(on) == num_replicas for on in placement.hosts_of.values())
    node_of = {slot.host: slot.node for slot in hosts}
    # ceil of a node's share: the quotas of its hosts are rounded one by one
    share = max(Counter(node_of.values()).values()) * -(-len(model.pairs) * num_replicas // num_hosts)
    if share <= len(model.pairs):
        assert all(len({node_of[host] for host in on}) == num_replicas for on in placement.hosts_of.values())
    for layer in model.moe_layers:
        copies = Counter(host for (at, _), on in placement.hosts_of.items() if at == layer for host in on)
        counts = [copies[slot.host] for slot in hosts]
        assert max(counts) - min(counts) <= 1
    assert place(model, hosts[::-1], num_replicas=num_replicas) == placement


def test_preferred_copies_are_even_where_every_host_holds_everything() -> None:
    placement = place(geometry(), slots(2), num_replicas=2)
    for layer in geometry().moe_layers:
        preferred = Counter(hosts[0] for (at, _), hosts in placement.hosts_of.items() if at == layer)
        assert preferred == {"expert-0": 8, "expert-1": 8}


@given(capacities=st.lists(st.integers(0, 400), min_size=1, max_size=8), num_replicas=st.integers(1, 3))
def test_capacities_are_respected_or_the_plan_is_refused(capacities: list[int], num_replicas: int) -> None:
    model = geometry(num_layers=2, num_experts=8)  # 16 pairs of 10 bytes
    hosts = [HostSlot(host=f"h{i}", node="n", capacity_bytes=size) for i, size in enumerate(capacities)]
    room = sum(min(16, size // 10) for size in capacities)
    if room < 16 * num_replicas or num_replicas > len(hosts):
        with pytest.raises(ValueError, match=r"fit|copies"):
            place(model, hosts, num_replicas=num_replicas)
        return
    placement = place(model, hosts, num_replicas=num_replicas)
    for slot in hosts:
        assert slot.capacity_bytes is not None
        assert 10 * len(placement.held_by(slot.host)) <= slot.capacity_bytes
    assert all(len(set(on)) == num_replicas for on in placement.hosts_of.values())


@pytest.mark.parametrize(
    ("hosts", "num_replicas", "message"),
    [
        ([], 1, "no expert host"),
        (slots(2), 3, "num_replicas=3 needs as many hosts and there are 2"),
        (slots(2), 0, "num_replicas=0"),
        (slots(2) + slots(1), 1, "host ids must differ"),
        (slots(2, capacity_bytes=319), 1, "64 experts of 10 bytes do not fit: the hosts have room for 62"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_the_reason(
    hosts: list[HostSlot], num_replicas: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        place(geometry(), hosts, num_replicas=num_replicas)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="no routed experts"):
        ExpertGeometry(moe_layers=(), num_experts=0, expert_width=96, expert_bytes=1)


def test_the_routing_table_names_hosts_and_incarnations() -> None:
    placement = place(geometry(), slots(2), num_replicas=2)
    table = routing_table(placement, epoch=3, incarnations={"expert-0": 5, "expert-1": 9}, num_slices=2)
    assert table.epoch == 3
    assert dict(table.incarnations) == {"expert-0": 5, "expert-1": 9}
    assert table.num_slices == 2
    assert [one.host for one in table.replicas[2, 1]] == list(placement.hosts_of[2, 1])
