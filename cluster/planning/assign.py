"""Carries the plan through the layers, each a barrier of its own: names to numbers, a placement of each, and back."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from cluster.planning.layer import place_layer
from cluster.planning.layer_state import LayerTask
from cluster.planning.loads import ExpertLoads
from cluster.planning.placement import ExpertGeometry, HostSlot, Pair
from cluster.planning.policy import PlanPolicy
from cluster.planning.preference import prefer
from cluster.planning.quotas import layer_quotas

HostsOf = Mapping[Pair, tuple[str, ...]]


def layer_tasks(
    geometry: ExpertGeometry,
    slots: Sequence[HostSlot],
    *,
    copies: Mapping[Pair, int],
    limits: Mapping[Pair, int],
    held: HostsOf,
    loads: ExpertLoads,
) -> list[LayerTask]:
    """Return one task a layer, in the order of `moe_layers`; hosts are numbered as in `slots`."""
    index = {slot.host: at for at, slot in enumerate(slots)}
    nodes = sorted({slot.node for slot in slots})
    quotas = layer_quotas(geometry, slots, copies=copies, limits=limits, held=held)
    tasks = []
    for layer, layer_quota in zip(geometry.moe_layers, quotas, strict=True):
        pairs = [(layer, expert) for expert in range(geometry.num_units)]
        tasks.append(
            LayerTask(
                loads=loads.of_layer(geometry, layer),
                copies=[copies[pair] for pair in pairs],
                node_limits=[limits[pair] for pair in pairs],
                held=[[index[host] for host in held[pair]] for pair in pairs],
                quotas=layer_quota,
                nodes=[nodes.index(slot.node) for slot in slots],
                weights=[slot.weight for slot in slots],
                num_slices=geometry.num_slices,
            )
        )
    return tasks


def assign(
    geometry: ExpertGeometry, slots: Sequence[HostSlot], tasks: Sequence[LayerTask], policy: PlanPolicy
) -> HostsOf:
    """Place every layer."""
    return _in_order(geometry, slots, tasks, [place_layer(task, policy) for task in tasks])


def stay(geometry: ExpertGeometry, slots: Sequence[HostSlot], tasks: Sequence[LayerTask]) -> HostsOf:
    """Leave all copies where they are and choose the order of each expert's hosts anew."""
    return _in_order(geometry, slots, tasks, [task.held for task in tasks])


def as_full(geometry: ExpertGeometry, slots: Sequence[HostSlot], one: HostsOf, other: HostsOf) -> bool:
    """Say whether every pair has as many copies in one placement as in the other, and hosts of each speed as much."""
    if any(len(on) != len(other[pair]) for pair, on in one.items()):
        return False
    counts, other_counts = (Counter(host for on in each.values() for host in on) for each in (one, other))
    return all(counts[slot.host] <= slot.room(geometry) for slot in slots) and (
        sorted((slot.weight, counts[slot.host]) for slot in slots)
        == sorted((slot.weight, other_counts[slot.host]) for slot in slots)
    )


def _in_order(
    geometry: ExpertGeometry,
    slots: Sequence[HostSlot],
    tasks: Sequence[LayerTask],
    holders: Sequence[Sequence[Collection[int]]],
) -> HostsOf:
    hosts_of: dict[Pair, tuple[str, ...]] = {}
    for turn, (layer, task) in enumerate(zip(geometry.moe_layers, tasks, strict=True)):
        order = prefer(
            holders[turn], task.loads, task.weights, current=task.held, turn=turn, num_slices=task.num_slices
        )
        hosts_of |= {(layer, expert): tuple(slots[at].host for at in on) for expert, on in enumerate(order)}
    return hosts_of
