"""Plans of experts on hosts: what they keep, what they spread, what they refuse, what they cost."""

import random
import time
from dataclasses import replace
from typing import Any

import pytest

from cluster.planning.balance import (
    ExpertLoads,
    Move,
    PlacementPlan,
    PlanPolicy,
    balancedness,
    plan_placement,
    worth_moving,
)
from cluster.planning.placement import ExpertGeometry, HostSlot, Placement, place
from tests.cluster.planning_cases import (
    BYTES,
    fewest_moves,
    geometry,
    held,
    held_in_layer,
    preferred_in_layer,
    skewed,
    slots,
)

MAVERICK = ExpertGeometry(
    moe_layers=tuple(range(1, 48, 2)), num_experts=128, expert_width=8192, expert_bytes=251_658_240
)


def plan(
    hosts: list[HostSlot],
    *,
    model: ExpertGeometry | None = None,
    current: Placement | None = None,
    loads: ExpertLoads | None = None,
    **policy: object,
) -> PlacementPlan:
    model = model or geometry()
    return plan_placement(
        model,
        hosts,
        current=current,
        loads=loads or ExpertLoads.uniform(model),
        policy=PlanPolicy(**policy),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("num_hosts", [2, 3, 4, 7, 16, 17])
def test_a_first_plan_is_as_even_as_place(num_hosts: int, num_replicas: int) -> None:
    hosts = slots(num_hosts)
    new, old = plan(hosts, num_replicas=num_replicas), place(geometry(), hosts, num_replicas=num_replicas)
    assert sorted(held(new.placement, hosts)) == sorted(held(old, hosts))
    for layer in geometry().moe_layers:
        assert sorted(held_in_layer(new.placement, hosts, layer)) == sorted(held_in_layer(old, hosts, layer))
        assert max(preferred_in_layer(new.placement, hosts, layer)) == -(-16 // num_hosts)
    assert new.balance_before == new.balance_after
    assert len(new.moves) == 64 * num_replicas
    assert all(move.source is None for move in new.moves)


def test_hosts_take_turns_at_what_does_not_divide() -> None:
    model, hosts = geometry(num_layers=4, num_experts=3), slots(2)
    placement = plan(hosts, model=model, num_replicas=2).placement
    preferred = [preferred_in_layer(placement, hosts, layer) for layer in model.moe_layers]
    assert [sum(layer[host] for layer in preferred) for host in range(2)] == [6, 6]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_growing_and_shrinking_moves_only_what_quotas_grow_by(num_replicas: int) -> None:
    model = geometry(num_layers=48)
    current = plan(slots(4), model=model, num_replicas=num_replicas).placement
    for num_hosts in (6, 3, 4):
        hosts = slots(num_hosts)
        step = plan(hosts, model=model, current=current, num_replicas=num_replicas)
        fewest = fewest_moves(current, hosts, 768 * num_replicas)
        assert fewest > 0
        assert fewest <= len(step.moves) <= 1.05 * fewest
        assert step.num_bytes == len(step.moves) * BYTES
        assert held(step.placement, hosts) == [768 * num_replicas // num_hosts] * num_hosts
        current = step.placement


def test_growth_by_measured_load_moves_what_evens_out_and_hardly_more() -> None:
    chance, model = random.Random(3), geometry(num_layers=24, num_experts=32)
    loads = ExpertLoads(rows={pair: chance.uniform(50, 150) for pair in model.pairs})
    before = plan(slots(4), model=model, loads=loads).placement
    step = plan(slots(8), model=model, current=before, loads=loads, min_gain=0.03)
    assert len(step.moves) <= 1.1 * fewest_moves(before, slots(8), 768)
    assert step.balance_after <= 1.03


@pytest.mark.parametrize("num_hosts", [3, 4, 5, 7])
def test_fewer_copies_are_reached_by_letting_go(num_hosts: int) -> None:
    before = plan(slots(num_hosts), num_replicas=3).placement
    fewer = plan(slots(num_hosts), current=before, num_replicas=2)
    assert fewer.moves == ()
    assert sum(map(len, fewer.released.values())) == 64
    assert plan(slots(num_hosts), current=fewer.placement).moves == ()


def test_growth_takes_experts_off_hosts_that_stay_and_says_which() -> None:
    before = plan(slots(4)).placement
    step = plan(slots(8), current=before)
    assert set(step.released) == {slot.host for slot in slots(4)}
    for host, pairs in step.released.items():
        assert len(pairs) == 8
        assert set(pairs) == set(before.held_by(host)) - set(step.placement.held_by(host))
    assert {move.target for move in step.moves} == {slot.host for slot in slots(8)[4:]}
    assert all(move.source == before.hosts_of[move.pair][0] for move in step.moves)


def test_copies_that_must_share_a_node_do_not_take_turns_at_it() -> None:
    """Of two experts' third copies one has to lie beside another on a node; which one is all the same."""
    sizes = {
        "expert-00": ("node-0", 2),
        "expert-13": ("node-1", 1),
        "expert-05": ("node-2", 2),
        "expert-99": ("node-0", 2),
    }
    hosts = [HostSlot(host=host, node=node, capacity_bytes=room * BYTES) for host, (node, room) in sizes.items()]
    model = geometry(num_layers=2, num_experts=1)
    first = plan(hosts, model=model, num_replicas=3)
    assert len(first.warnings) == 1
    for _ in range(3):
        again = plan(hosts, model=model, current=first.placement, num_replicas=3)
        assert again.moves == ()
        first = again


def test_a_host_that_lost_memory_holds_less() -> None:
    model, (first, second) = geometry(num_layers=1, num_experts=6), slots(2, num_copies=2)
    before = plan([replace(first, capacity_bytes=None), second], model=model).placement
    assert held(before, [first, second]) == [4, 2]
    after = plan([first, replace(second, capacity_bytes=None)], model=model, current=before)
    assert held(after.placement, [first, second]) == [2, 4]


def test_a_dead_host_is_no_source_and_a_drained_one_is() -> None:
    before = plan(slots(3)).placement
    lost = set(before.held_by("expert-02"))
    drained = plan(slots(2), current=before)
    assert {(move.pair, move.source) for move in drained.moves} == {(pair, "expert-02") for pair in lost}
    repaired = plan(slots(2), current=before.without({"expert-02"}))
    assert {(move.pair, move.source) for move in repaired.moves} == {(pair, None) for pair in lost}
    assert repaired.placement == drained.placement


def test_sources_are_copies_that_stay() -> None:
    before = plan(slots(4), num_replicas=2).placement
    step = plan(slots(3), current=before, num_replicas=2)
    for move in step.moves:
        assert move.source != "expert-03"
        assert move.source in before.hosts_of[move.pair]


def test_a_cluster_shrinks_to_one_host() -> None:
    step = plan(slots(1), current=plan(slots(4), num_replicas=2).placement, num_replicas=2)
    assert step.placement.held_by("expert-00") == tuple(sorted(geometry().pairs))
    assert step.num_replicas_reached == 1
    (warning,) = step.warnings
    assert "num_replicas=2 is reached for 0 of 64 experts, the others have 1" in warning
    assert "there are 1; have 2 hosts" in warning


def test_hosts_that_are_twice_as_fast_get_twice_as_much() -> None:
    hosts = [replace(slot, weight=2.0 if index < 2 else 1.0) for index, slot in enumerate(slots(4))]
    model = geometry(num_layers=6, num_experts=12)
    first = plan(hosts, model=model)
    assert held(first.placement, hosts) == [24, 24, 12, 12]
    assert first.balance_after == pytest.approx(1.0)
    doubled = plan(hosts, model=model, num_replicas=2)
    for layer in model.moe_layers:
        assert preferred_in_layer(doubled.placement, hosts, layer) == [4, 4, 2, 2]
    assert held(place(model, hosts), hosts) == [24, 24, 12, 12]


def test_copies_that_do_not_fit_are_taken_from_the_coldest() -> None:
    model = geometry(num_layers=2, num_experts=8)
    loads = ExpertLoads(rows={(layer, expert): 1.0 + expert for layer, expert in model.pairs})
    step = plan(slots(4, num_copies=7), model=model, loads=loads, num_replicas=2)
    assert step.num_replicas_reached == 1
    num_copies = {pair: len(on) for pair, on in step.placement.hosts_of.items()}
    assert {pair for pair, num in num_copies.items() if num == 1} == {
        (layer, cold) for layer in (0, 2) for cold in (0, 1)
    }
    (warning,) = step.warnings
    assert "reached for 12 of 16 experts" in warning
    assert "room for 28 copies and 32 are wanted; add 40 bytes" in warning


def test_measured_loads_that_waver_do_not_move_copies_about() -> None:
    model = geometry(num_layers=2, num_experts=8)
    hosts = slots(4, num_copies=7)
    loads = ExpertLoads(rows={(layer, expert): 100.0 + expert for layer, expert in model.pairs})
    before = plan(hosts, model=model, loads=loads, num_replicas=2).placement
    wavering = ExpertLoads(rows={(layer, expert): 107.0 - expert for layer, expert in model.pairs})
    assert plan(hosts, model=model, current=before, loads=wavering, num_replicas=2, min_gain=0.1).moves == ()


def test_hot_experts_get_the_copies_that_memory_allows() -> None:
    model = geometry(num_layers=2, num_experts=8)
    loads = skewed(model, times=16.0)
    step = plan(slots(4, num_copies=5), model=model, loads=loads, max_extra=2, split=True)
    num_copies = {pair: len(on) for pair, on in step.placement.hosts_of.items()}
    assert num_copies == {pair: 3 if loads.rows[pair] == 16.0 else 1 for pair in model.pairs}
    tight = plan(slots(4, num_copies=4), model=model, loads=loads, max_extra=2, split=True)
    assert len(tight.moves) == 16
    assert step.balance_after < tight.balance_after


def test_even_loads_get_no_further_copies() -> None:
    assert len(plan(slots(4), max_extra=8, split=True).moves) == 64


def test_a_hot_expert_is_left_with_the_coldest_beside_it() -> None:
    model = geometry(num_layers=1, num_experts=8)
    loads = ExpertLoads(rows={(0, 0): 8.0, (0, 1): 4.0, (0, 2): 4.0, (0, 3): 4.0, (0, 4): 4.0})
    hosts = slots(4)
    even = plan(hosts, model=model).placement
    step = plan(hosts, model=model, current=even, loads=loads)
    (busiest,) = step.placement.hosts_of[0, 0]
    assert sum(loads.rows.get(pair, 0.0) for pair in step.placement.held_by(busiest)) == 8.0
    assert step.balance_after == pytest.approx(8 / 6)
    assert step.balance_before > step.balance_after
    unmoved = plan(hosts, model=model, current=even, loads=loads, rebalance=False)
    assert unmoved.moves == ()
    assert unmoved.balance_after == unmoved.balance_before == step.balance_before


@pytest.mark.parametrize(("num_hosts", "num_nodes"), [(4, 1), (4, 2), (6, 2), (6, 3), (8, 2)])
def test_the_rows_of_any_lost_host_are_shared_by_the_others(num_hosts: int, num_nodes: int) -> None:
    hosts, model = slots(num_hosts, num_nodes), geometry(num_layers=6, num_experts=48)
    placement = plan(hosts, model=model, num_replicas=2).placement
    for lost in hosts:
        others = [slot for slot in hosts if slot.host != lost.host]
        # Those on its node hold no second copy of what it holds.
        takers = [slot for slot in others if num_nodes == 1 or slot.node != lost.node]
        for layer in model.moe_layers:
            assert preferred_in_layer(placement, hosts, layer) == [48 // num_hosts] * num_hosts
            after = preferred_in_layer(placement, others, layer, lost=lost.host)
            assert sum(after) == 48
            assert max(after) <= 48 // num_hosts + -(-48 // num_hosts // len(takers)) + 1


def test_a_small_node_keeps_one_copy_of_each_as_far_as_its_memory_goes() -> None:
    hosts = [HostSlot(host=f"a{index}", node="a") for index in range(3)]
    alone = plan([*hosts, HostSlot(host="b0", node="b")], num_replicas=2)
    assert len(alone.placement.held_by("b0")) == 64  # half of all copies, so that no node's loss takes an expert
    assert alone.warnings == ()
    tight = plan([*hosts, HostSlot(host="b0", node="b", capacity_bytes=40 * BYTES)], num_replicas=2)
    assert len(tight.placement.held_by("b0")) == 40
    (warning,) = tight.warnings
    assert "24 of 64 experts have copies that share a node" in warning


@pytest.mark.parametrize(
    ("hosts", "policy", "message"),
    [
        ([], {}, "there is no expert host"),
        (slots(2) + slots(1), {}, "host ids must differ"),
        (
            slots(2, num_copies=20),
            {},
            "64 experts of 10 bytes do not fit: 2 hosts have room for 40; have 4 hosts like the largest of them, "
            "or give each of 2 hosts 320 bytes",
        ),
        (slots(2, num_copies=0), {}, "room for 0; give each of 2 hosts 320 bytes"),
        (slots(2), {"num_replicas": 3, "require_replicas": True}, "there are 2; have 3 hosts, or ask for fewer"),
        (
            slots(4, num_copies=30),
            {"num_replicas": 2, "require_replicas": True},
            "room for 120 copies and 128 are wanted; add 80 bytes, or ask for fewer copies",
        ),
        (slots(2), {"num_replicas": 0}, "num_replicas=0"),
        (slots(2), {"max_extra": -1}, "max_extra=-1"),
        (slots(2), {"hot_ratio": -0.5}, "hot_ratio=-0.5"),
        (slots(2), {"min_gain": 0.0}, r"min_gain=0\.0"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_figures_and_a_remedy(
    hosts: list[HostSlot], policy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(hosts, **policy)


def test_loads_and_placements_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loads name \(layer, expert\) \(1, 0\)"):
        plan(slots(2), loads=ExpertLoads(rows={(1, 0): 1.0}))
    with pytest.raises(ValueError, match=r"current placement names \(layer, expert\) \(0, 16\)"):
        plan(slots(2), current=Placement(hosts_of={(0, 16): ("expert-00",)}))
    with pytest.raises(ValueError, match=r"load of \(layer, expert\) \(0, 0\) is -1"):
        ExpertLoads(rows={(0, 0): -1.0})
    with pytest.raises(ValueError, match=r"weight 0\.0"):
        HostSlot(host="h", node="n", weight=0.0)
    with pytest.raises(ValueError, match="capacity_bytes=-1"):
        HostSlot(host="h", node="n", capacity_bytes=-1)


def test_balancedness_is_the_mean_over_layers_of_the_busiest_over_the_mean() -> None:
    model = geometry(num_layers=2, num_experts=2)
    placement = Placement(hosts_of={(0, 0): ("a",), (0, 1): ("b",), (2, 0): ("a",), (2, 1): ("a", "b")})
    loads = ExpertLoads(rows={(0, 0): 3.0, (0, 1): 1.0, (2, 0): 1.0, (2, 1): 1.0})
    assert balancedness(model, placement, loads) == pytest.approx((3 / 2 + 2 / 1) / 2)
    assert balancedness(model, placement, loads, split=True) == pytest.approx((3 / 2 + 1.5 / 1) / 2)
    fast = {"a": 3.0, "b": 1.0}
    assert balancedness(model, placement, loads, weights=fast) == pytest.approx((1 / 1 + (2 / 3) / (2 / 4)) / 2)
    idle = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert balancedness(model, placement, loads, weights=idle) == pytest.approx((3 / (4 / 3) + 2 / (2 / 3)) / 2)
    assert balancedness(model, placement, ExpertLoads(rows={})) == 1.0


def test_a_move_pays_when_the_time_saved_exceeds_the_time_its_bytes_take() -> None:
    before = Placement(hosts_of={(0, 0): ("a",), (0, 1): ("a",)})
    after = plan([HostSlot(host="a", node="n"), HostSlot(host="b", node="n")], model=geometry(1, 2), current=before)
    assert len(after.moves) == 1  # 10 bytes: 5 s at 2 bytes a second
    assert (after.busiest_before, after.busiest_after) == (1.0, 0.5)
    # 100 rows a second of 1 ms: the busiest host works 0.1 s a second before and 0.05 after, so 100 s save 5 s.
    price = {"seconds_per_row": 1e-3, "bytes_per_s": 2.0, "rows_per_s": 100.0}
    assert worth_moving(after, horizon_s=101.0, **price)
    assert not worth_moving(after, horizon_s=99.0, **price)
    lost = replace(after, moves=(Move(pair=(0, 0), source=None, target="b"),))
    assert worth_moving(lost, horizon_s=0.0, **price)
    with pytest.raises(ValueError, match=r"bytes_per_s=0\.0"):
        worth_moving(after, seconds_per_row=1e-3, horizon_s=1.0, bytes_per_s=0.0, rows_per_s=1.0)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_model_of_the_size_of_maverick_is_planned_in_two_seconds(num_replicas: int) -> None:
    current = None
    for num_hosts in (64, 48, 64):
        loads = skewed(MAVERICK, hot=num_hosts, times=20.0)
        began = time.process_time()
        step = plan(slots(num_hosts, 8), model=MAVERICK, current=current, loads=loads, num_replicas=num_replicas)
        assert time.process_time() - began < 2.0
        current = step.placement
