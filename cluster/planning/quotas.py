"""Decides how many copies each host holds in each layer; which experts they are is not known here.

Every layer is a barrier, so a host gets its share of each: floor or ceil of it, so chosen that sums over layers are the
host's own quota and that hosts which hold more of a layer now keep more of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.planning.matching import Matching, Matrix
from cluster.planning.placement import ExpertGeometry, HostSlot, Pair
from cluster.planning.shares import share_out_apart


def node_limits(hosts: Sequence[HostSlot], copies: Mapping[Pair, int], geometry: ExpertGeometry) -> dict[Pair, int]:
    """Return how many copies of a pair one node must hold if copies lie on as many nodes as there are."""
    sizes = Counter(slot.node for slot in hosts if slot.room(geometry)).values()
    fewest: dict[int, int] = {}
    for num in set(copies.values()):
        fewest[num] = next((limit for limit in range(1, num) if sum(min(limit, size) for size in sizes) >= num), num)
    return {pair: fewest[num] for pair, num in copies.items()}


def layer_quotas(
    geometry: ExpertGeometry,
    hosts: Sequence[HostSlot],
    *,
    copies: Mapping[Pair, int],
    limits: Mapping[Pair, int],
    held: Mapping[Pair, Sequence[str]],
) -> Matrix:
    """Return the number of copies per layer and host, in the order of `moe_layers` and `hosts`."""
    index = {slot.host: at for at, slot in enumerate(hosts)}
    row = {layer: at for at, layer in enumerate(geometry.moe_layers)}
    now = [[0] * len(hosts) for _ in row]
    for (layer, _), on in held.items():
        for host in on:
            now[row[layer]][index[host]] += 1
    quotas = _host_quotas(geometry, hosts, sum(copies.values()), sum(limits.values()), now)
    need = [0] * len(row)
    most_on_node = [0] * len(row)
    for pair, num in copies.items():
        need[row[pair[0]]] += num
        most_on_node[row[pair[0]]] += limits[pair]
    return _round(need, quotas, [slot.node for slot in hosts], now, most_on_node, geometry.num_units)


def _host_quotas(
    geometry: ExpertGeometry, hosts: Sequence[HostSlot], total: int, node_limit: int, now: Matrix
) -> list[int]:
    shares = share_out_apart(
        total,
        limits={slot.host: slot.room(geometry) for slot in hosts},
        weights={slot.host: slot.weight for slot in hosts},
        held={slot.host: sum(counts[at] for counts in now) for at, slot in enumerate(hosts)},
        node_of={slot.host: slot.node for slot in hosts},
        node_limit=node_limit,
    )
    return [shares[slot.host] for slot in hosts]


def _round(
    need: Sequence[int],
    quotas: Sequence[int],
    nodes: Sequence[str],
    now: Matrix,
    most_on_node: Sequence[int],
    num_units: int,
) -> Matrix:
    """Round each layer's share of each host's quota down or up so that both sums come out."""
    total = sum(need)
    least = [[min(num_units, quota * num // total) for quota in quotas] for num in need]
    most = [[min(num_units, -(-quota * num // total)) for quota in quotas] for num in need]
    order = sorted(set(nodes))
    matching = Matching(
        need=need,
        room=quotas,
        group_of=[order.index(node) for node in nodes],
        least=least,
        most=most,
        group_most=[[limit] * len(order) for limit in most_on_node],
    )

    def stays(layer: int, host: int) -> bool:
        return now[layer][host] > least[layer][host]

    for keeping in (True, False):
        for layer in range(len(need)):
            while matching.need[layer] > 0:
                options = [host for host in matching.open_columns(layer) if not keeping or stays(layer, host)]
                if not options:
                    break
                matching.put(layer, max(options, key=matching.room.__getitem__))
        if keeping:
            matching.augment(only=stays)
    matching.augment(cheap=stays)
    # Hosts of very unequal memory: a layer's copies fit only if some host takes more or less than its share of that
    # layer, and then only if some node holds two copies of a pair.
    matching.least = [[0] * len(quotas) for _ in need]
    matching.most = [[num_units] * len(quotas) for _ in need]
    matching.augment()
    matching.group_most = [[total] * len(order) for _ in need]
    matching.augment()
    return matching.count
