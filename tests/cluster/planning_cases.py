"""Small models and hosts for the planner's tests, and the slow, obvious counts they compare with."""

from collections import Counter
from collections.abc import Sequence

from cluster.planning.balance import ExpertLoads
from cluster.planning.placement import ExpertGeometry, HostSlot, Placement

BYTES = 10  # of one unit: an expert, or a slice of one


def geometry(num_layers: int = 4, num_experts: int = 16, num_slices: int = 1) -> ExpertGeometry:
    return ExpertGeometry(
        moe_layers=tuple(range(0, 2 * num_layers, 2)), num_experts=num_experts, expert_width=96,
        expert_bytes=BYTES * num_slices, num_slices=num_slices, slice_bytes=BYTES,
    )  # fmt: skip


def slots(num_hosts: int, num_nodes: int = 1, *, num_copies: int | None = None) -> list[HostSlot]:
    """Hosts in turn on nodes, with memory for so many copies."""
    capacity = None if num_copies is None else num_copies * BYTES
    return [
        HostSlot(host=f"expert-{i:02}", node=f"node-{i % num_nodes}", capacity_bytes=capacity) for i in range(num_hosts)
    ]


def skewed(model: ExpertGeometry, *, hot: int = 0, times: float = 8.0) -> ExpertLoads:
    """Every expert alike but one, which differs between layers."""
    rows = dict.fromkeys(model.pairs, 1.0)
    for index, layer in enumerate(model.moe_layers):
        rows[layer, (hot + index) % model.num_units] = times
    return ExpertLoads(rows=rows)


def held(placement: Placement, hosts: Sequence[HostSlot]) -> list[int]:
    """Copies on each host."""
    counts = Counter(host for on in placement.hosts_of.values() for host in on)
    return [counts[slot.host] for slot in hosts]


def held_in_layer(placement: Placement, hosts: Sequence[HostSlot], layer: int) -> list[int]:
    counts = Counter(host for (at, _), on in placement.hosts_of.items() if at == layer for host in on)
    return [counts[slot.host] for slot in hosts]


def preferred_in_layer(placement: Placement, hosts: Sequence[HostSlot], layer: int, lost: str = "") -> list[int]:
    """Experts whose rows go to each host, once `lost` is gone."""
    takers = Counter(
        next(host for host in on if host != lost) for (at, _), on in placement.hosts_of.items() if at == layer
    )
    return [takers[slot.host] for slot in hosts]


def fewest_moves(before: Placement, hosts: Sequence[HostSlot], total: int) -> int:
    """Return what any even placement of `total` copies on these hosts must at least move: what their quotas grow by.

    Larger quotas go to those that hold most.
    """
    quota, larger = divmod(total, len(hosts))
    counts = sorted(held(before, hosts), reverse=True)
    return sum(max(0, quota + (at < larger) - count) for at, count in enumerate(counts))


def most_on_one_node(hosts_of_pair: Sequence[str], hosts: Sequence[HostSlot]) -> int:
    node_of = {slot.host: slot.node for slot in hosts}
    return max(Counter(node_of[host] for host in hosts_of_pair).values())
