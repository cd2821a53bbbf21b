"""Plans of experts cut into slices: even, apart, and the slices of an expert work side by side."""

import pytest

from cluster.planning.balance import ExpertLoads, PlanPolicy, plan_placement
from cluster.planning.placement import ExpertGeometry, HostSlot, Placement
from cluster.planning.siblings import part
from tests.cluster.planning_cases import held_in_layer, preferred_in_layer, slots


def geometry(num_slices: int, *, num_layers: int = 3, num_experts: int = 8) -> ExpertGeometry:
    return ExpertGeometry(
        moe_layers=tuple(range(num_layers)), num_experts=num_experts, expert_width=1024,
        expert_bytes=10 * num_slices, num_slices=num_slices, slice_bytes=10,
    )  # fmt: skip


def together(model: ExpertGeometry, placement: Placement) -> int:
    """Count experts two of whose slices are asked of one host."""
    experts = [
        [placement.hosts_of[layer, expert * model.num_slices + index][0] for index in range(model.num_slices)]
        for layer in model.moe_layers
        for expert in range(model.num_experts)
    ]
    return sum(len(set(hosts)) < len(hosts) for hosts in experts)


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize(("num_slices", "num_hosts"), [(2, 4), (2, 7), (4, 8), (4, 11)])
def test_slices_of_an_expert_are_asked_of_different_hosts(num_slices: int, num_hosts: int, num_replicas: int) -> None:
    model, hosts = geometry(num_slices), slots(num_hosts)
    plan = plan_placement(
        model, hosts, current=None, loads=ExpertLoads.uniform(model), policy=PlanPolicy(num_replicas=num_replicas)
    )
    assert together(model, plan.placement) == 0
    assert all(len(set(on)) == num_replicas for on in plan.placement.hosts_of.values())
    for layer in model.moe_layers:
        for counts in (held_in_layer, preferred_in_layer):
            loads = counts(plan.placement, hosts, layer)
            assert max(loads) - min(loads) <= 1 + (counts is preferred_in_layer)


def test_a_growing_cluster_keeps_slices_apart_by_the_order_of_their_hosts() -> None:
    model, current = geometry(2, num_layers=4, num_experts=16), None
    for num_hosts in (4, 6, 8):
        current = plan_placement(
            model,
            slots(num_hosts, 2),
            current=current,
            loads=ExpertLoads.uniform(model),
            policy=PlanPolicy(num_replicas=2),
        ).placement
        assert together(model, current) == 0


def test_a_host_may_have_room_for_less_than_one_expert() -> None:
    model = geometry(4, num_layers=1, num_experts=2)
    small = [HostSlot(host=f"e{i}", node="n", capacity_bytes=39) for i in range(4)]  # three slices of four
    plan = plan_placement(
        model, small, current=None, loads=ExpertLoads.uniform(model), policy=PlanPolicy(num_replicas=1)
    )
    assert sorted(len(plan.placement.held_by(slot.host)) for slot in small) == [2, 2, 2, 2]
    whole = ExpertGeometry(moe_layers=(0,), num_experts=2, expert_width=1024, expert_bytes=40)
    with pytest.raises(ValueError, match="2 experts of 40 bytes do not fit"):
        plan_placement(whole, small, current=None, loads=ExpertLoads.uniform(whole), policy=PlanPolicy())
    with pytest.raises(ValueError, match="8 expert slices of 10 bytes do not fit"):
        plan_placement(model, small[:2], current=None, loads=ExpertLoads.uniform(model), policy=PlanPolicy())


def test_parting_exchanges_equals_and_nothing_else() -> None:
    where = [{0}, {0}, {1}, {1}]  # two experts of two slices, each on one host
    part(where, 2, [1.0] * 4, [1.0, 1.0], lambda unit, source, target: True)
    assert sorted(map(sorted, where[:2])) == sorted(map(sorted, where[2:])) == [[0], [1]]
    heavy = [{0}, {0}, {1}, {1}]
    part(heavy, 2, [1.0, 1.0, 9.0, 9.0], [1.0, 1.0], lambda unit, source, target: True)
    assert heavy != [{0}, {0}, {1}, {1}], "the busiest host gets less to do"
    busier = [{0}, {0}, {1}, {1}]
    part(busier, 2, [4.0, 3.0, 5.0, 2.0], [1.0, 1.0], lambda unit, source, target: target != 1)
    assert busier == [{0}, {0}, {1}, {1}], "what may not move stays"


def test_a_geometry_names_a_cut_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="expert_slices=2000 does not fit"):
        ExpertGeometry(
            moe_layers=(0,), num_experts=1, expert_width=1024, expert_bytes=1, num_slices=2000, slice_bytes=1
        )
    with pytest.raises(ValueError, match="bytes of the largest slice"):
        ExpertGeometry(moe_layers=(0,), num_experts=1, expert_width=1024, expert_bytes=1, num_slices=2)
