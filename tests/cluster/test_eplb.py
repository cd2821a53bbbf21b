"""Our balance against DeepSeek's published method on the same loads and slots."""

import random
from statistics import mean

import pytest

from cluster.planning.balance import ExpertLoads, PlanPolicy, plan_placement
from cluster.planning.placement import Placement
from tests.cluster.eplb_oracle import eplb_global, eplb_hierarchical, pack, ratio, replicate
from tests.cluster.planning_cases import geometry, slots

KINDS = ["uniform", "zipf", "one hot", "even"]


def draw(kind: str, num_experts: int, seed: str) -> list[float]:
    chance = random.Random(seed)
    if kind == "uniform":
        return [chance.uniform(50, 150) for _ in range(num_experts)]
    if kind == "zipf":
        steepness = chance.uniform(0.5, 1.5)
        return chance.sample([1 / rank**steepness for rank in range(1, num_experts + 1)], num_experts)
    loads = [1.0] * num_experts
    if kind == "one hot":
        loads[chance.randrange(num_experts)] = chance.uniform(2, num_experts)
    return loads


def our_balance(
    loads: list[float],
    num_hosts: int,
    num_slots: int,
    *,
    num_nodes: int = 1,
    current: Placement | None = None,
    min_gain: float = 0.01,
) -> float:
    """Balance of one layer with as many slots a host as the oracle has, all of which may be used."""
    model = geometry(1, len(loads))
    return plan_placement(
        model,
        slots(num_hosts, num_nodes, num_copies=num_slots // num_hosts),
        current=current,
        loads=ExpertLoads(rows={(0, expert): load for expert, load in enumerate(loads)}),
        policy=PlanPolicy(max_extra=num_slots - len(loads), hot_ratio=0.0, split=True, min_gain=min_gain),
    ).balance_after


def cases(kind: str, num_experts: int) -> list[tuple[list[float], int, int]]:
    return [
        (draw(kind, num_experts, f"{kind} {num_experts} {num_hosts} {extra} {seed}"), num_hosts, num_slots)
        for num_hosts in (2, 3, 4, 6, 8, 16, 32, 64)
        for extra in (0, 1, 4)
        for seed in range(4)
        if (num_slots := num_hosts * (-(-num_experts // num_hosts) + extra)) <= num_experts * num_hosts
    ]


@pytest.mark.parametrize("num_experts", [16, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_as_even_as_those_of_eplb(kind: str, num_experts: int) -> None:
    found = [
        our_balance(loads, num_hosts, num_slots) / ratio(eplb_global(loads, num_hosts, num_slots), loads)
        for loads, num_hosts, num_slots in cases(kind, num_experts)
    ]
    assert len(found) >= 80
    assert mean(found) <= 1.005
    assert max(found) <= 1.1


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one hot"])
def test_packing_alone_is_as_even_as_eplb(kind: str) -> None:
    """No exchange gains ten times the mean load."""
    found = [
        our_balance(loads, num_hosts, num_slots, min_gain=10.0) / ratio(eplb_global(loads, num_hosts, num_slots), loads)
        for loads, num_hosts, num_slots in cases(kind, 128)
    ]
    assert mean(found) <= 1.005
    assert max(found) <= 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_moved_from_an_even_placement_is_as_even_as_eplb_from_nothing(kind: str) -> None:
    """Few extra copies beside many experts: what counts is how well those that lie somewhere are exchanged."""
    found = []
    for loads, num_hosts, num_slots in cases(kind, 128):
        even = plan_placement(
            geometry(1, 128), slots(num_hosts), current=None, loads=ExpertLoads(rows={}), policy=PlanPolicy()
        )
        theirs = ratio(eplb_global(loads, num_hosts, num_slots), loads)
        found.append(our_balance(loads, num_hosts, num_slots, current=even.placement) / theirs)
    assert mean(found) <= 1.02
    assert max(found) <= 1.2


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one hot"])
def test_plans_on_nodes_are_as_even_as_those_of_hierarchical_eplb(kind: str) -> None:
    found = []
    for seed in range(10):
        for num_hosts, num_nodes in ((4, 2), (8, 2), (8, 4)):
            loads = draw(kind, 64, f"{kind} {seed} {num_hosts} {num_nodes}")
            num_slots = 64 + num_hosts
            theirs = eplb_hierarchical(loads, num_hosts, num_slots, num_groups=64, num_nodes=num_nodes)
            found.append(our_balance(loads, num_hosts, num_slots, num_nodes=num_nodes) / ratio(theirs, loads))
    assert mean(found) <= 1.005
    assert max(found) <= 1.1


def test_the_oracle_packs_and_replicates_as_described() -> None:
    assert pack([9, 1, 5, 4], 2) == [[0, 1], [2, 3]]
    assert replicate([8, 2, 2], 6) == [4, 1, 1]
    assert ratio([[0, 1], [0, 2]], [8, 2, 2]) == 1.0
    assert ratio([[0], [1]], [3, 1]) == 1.5
    assert eplb_global([8, 2, 2], 2, 4) == [[0, 1], [0, 2]]
