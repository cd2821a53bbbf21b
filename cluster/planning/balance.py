"""Plans who holds which expert next: even by measured load, apart, within memory, with the fewest moves.

A pure function of numbers: no Ray, torch, gRPC, clock or chance; whoever carries a plan out is elsewhere. Its steps are
in `planning`: copies of each (layer, expert), quotas of each host and layer, experts of each layer, order of hosts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.planning.assign import HostsOf, as_full, assign, layer_tasks, stay
from cluster.planning.copies import count_copies
from cluster.planning.loads import ExpertLoads, balancedness
from cluster.planning.movement import Move, crowded, crowded_pairs, moves_between, released_by
from cluster.planning.placement import ExpertGeometry, HostSlot, Pair, Placement, check_hosts
from cluster.planning.policy import PlanPolicy
from cluster.planning.quotas import node_limits

__all__ = ["ExpertLoads", "Move", "PlacementPlan", "PlanPolicy", "balancedness", "plan_placement", "worth_moving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """The next placement and the way there.

    `released` is what hosts that stay no longer hold. Balances are those of `balancedness`; before over the hosts that
    held something, and as after where there was no placement. `busiest` is how large a part of all rows a host of
    weight 1 would compute if it were the busiest, mean over layers.
    """

    placement: Placement
    moves: tuple[Move, ...]
    released: Mapping[str, tuple[Pair, ...]]
    num_bytes: int
    balance_before: float
    balance_after: float
    busiest_before: float
    busiest_after: float
    num_replicas_reached: int
    warnings: tuple[str, ...]


def plan_placement(
    geometry: ExpertGeometry,
    hosts: Sequence[HostSlot],
    *,
    current: Placement | None,
    loads: ExpertLoads,
    policy: PlanPolicy,
) -> PlacementPlan:
    """Plan the placement on `hosts`, which is independent of their order, from the `current` one.

    Hosts of `current` that are not in `hosts` lose everything but can be a move's source, so leave out dead ones
    (`Placement.without`). Copies of a pair lie on distinct hosts, and on distinct nodes as far as nodes have memory.
    Raises ValueError when it cannot fit.
    """
    check_hosts(hosts)
    loads.check(geometry)
    before = {pair: current.hosts_of.get(pair, ()) if current else () for pair in geometry.pairs}
    if current and (unknown := current.hosts_of.keys() - before.keys()):
        raise ValueError(f"the current placement names (layer, expert) {min(unknown)}, which the model does not have")
    slots = sorted(hosts, key=lambda slot: (slot.node, slot.host))
    names = {slot.host for slot in slots}
    held = {pair: tuple(host for host in on if host in names) for pair, on in before.items()}
    copies, warnings = count_copies(geometry, slots, loads=loads, policy=policy, held=held)
    limits = node_limits(slots, copies, geometry)
    tasks = layer_tasks(geometry, slots, copies=copies, limits=limits, held=held, loads=loads)
    weights = {slot.host: slot.weight for slot in slots}

    def busiest(hosts_of: HostsOf, weights: Mapping[str, float]) -> float:
        placement = Placement(hosts_of=hosts_of)
        return balancedness(geometry, placement, loads, split=policy.split, weights=weights) / sum(weights.values())

    after = assign(geometry, slots, tasks, policy)
    if as_full(geometry, slots, held, after):
        # Where nothing is gained nothing moves, and a plan made again is the same.
        unmoved = stay(geometry, slots, tasks)
        no_closer = len(crowded_pairs(slots, unmoved, limits)) <= len(crowded_pairs(slots, after, limits))
        if no_closer and busiest(unmoved, weights) <= busiest(after, weights) * (1 + policy.min_gain):
            after = unmoved
    weights_before = {host: weights.get(host, 1.0) for on in before.values() for host in on}
    assert all(after.values()), "a (layer, expert) was left without a host"
    busiest_after = busiest(after, weights)
    busiest_before = busiest(before, weights_before) if weights_before else busiest_after
    moves = moves_between(before, after)
    return PlacementPlan(
        placement=Placement(hosts_of=after),
        moves=moves,
        released=released_by(names, before, after),
        num_bytes=len(moves) * geometry.slice_bytes,
        balance_before=busiest_before * sum((weights_before or weights).values()),
        balance_after=busiest_after * sum(weights.values()),
        busiest_before=busiest_before,
        busiest_after=busiest_after,
        num_replicas_reached=min(len(on) for on in after.values()),
        warnings=warnings + crowded(slots, after, limits),
    )


def worth_moving(
    plan: PlacementPlan, *, seconds_per_row: float, horizon_s: float, bytes_per_s: float, rows_per_s: float
) -> bool:
    """Say whether the time saved over the horizon exceeds the time that the plan's bytes take.

    `rows_per_s` are those of all layers and hosts together; a step waits for the busiest host of each layer. A copy
    that nobody holds has no price: it is always worth it.
    """
    if not bytes_per_s > 0:
        raise ValueError(f"{bytes_per_s=}: moving takes time; give the rate at which experts are loaded")
    if any(move.source is None for move in plan.moves):
        return True
    saved_s = (plan.busiest_before - plan.busiest_after) * rows_per_s * seconds_per_row * horizon_s
    return saved_s > plan.num_bytes / bytes_per_s
