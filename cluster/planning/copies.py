"""Decides how many copies each (layer, expert) gets, from memory and load; not where they lie."""

import heapq
from collections.abc import Iterator, Mapping, Sequence

from cluster.planning.loads import ExpertLoads
from cluster.planning.placement import ExpertGeometry, HostSlot, Pair
from cluster.planning.policy import PlanPolicy

# A copy that is there counts as this much hotter: measured loads waver, and copies should not come and go with them.
STAY = 1.25


def count_copies(
    geometry: ExpertGeometry,
    hosts: Sequence[HostSlot],
    *,
    loads: ExpertLoads,
    policy: PlanPolicy,
    held: Mapping[Pair, Sequence[str]],
) -> tuple[dict[Pair, int], tuple[str, ...]]:
    """Return the number of copies of every pair, and a warning where memory or hosts allow fewer than wanted.

    Hot pairs get the copies there is room for; the coldest lose theirs first. Raises ValueError when not even one copy
    of each fits, or fewer than required.
    """
    pairs, room = geometry.pairs, sum(slot.room(geometry) for slot in hosts)
    if room < len(pairs):
        raise ValueError(_too_small(geometry, hosts, room))
    full = min(policy.num_replicas, room // len(pairs))  # no host has room for two copies of a pair
    spare = room - full * len(pairs)
    heat = {
        (layer, expert): load
        for layer in geometry.moe_layers
        for expert, load in enumerate(loads.of_layer(geometry, layer))
    }
    copies = dict.fromkeys(pairs, full)
    if full < policy.num_replicas:
        # Sorting is stable and pairs have layers innermost: equally hot ones are taken evenly over the layers.
        hottest = sorted(pairs, key=lambda pair: -heat[pair] * (STAY if len(held[pair]) > full else 1.0))
        copies |= dict.fromkeys(hottest[:spare], full + 1)
    else:
        for pair in _hot(geometry, len(hosts), spare, heat, policy, held, copies):
            copies[pair] += 1
    if full == policy.num_replicas:
        return copies, ()
    missing = _too_few(geometry, hosts, room, copies, policy.num_replicas)
    if policy.require_replicas:
        raise ValueError(f"{missing}, or ask for fewer copies")
    return copies, (missing,)


def _hot(
    geometry: ExpertGeometry,
    num_hosts: int,
    spare: int,
    heat: Mapping[Pair, float],
    policy: PlanPolicy,
    held: Mapping[Pair, Sequence[str]],
    copies: Mapping[Pair, int],
) -> Iterator[Pair]:
    """Yield the pair that gets the next further copy: the one whose copies are busiest, as EPLB does.

    Source: github.com/deepseek-ai/EPLB, replicate_experts.
    """
    if not policy.max_extra:
        return
    full = copies[geometry.pairs[0]]
    bound = policy.hot_ratio * min(1 / full, geometry.num_units / num_hosts)
    left = dict.fromkeys(geometry.moe_layers, policy.max_extra)

    def busy(pair: Pair, num: int) -> float:
        return heat[pair] / num * (STAY if len(held[pair]) > num else 1.0)

    queue = [(-busy(pair, full), pair[1], pair[0], full) for pair in geometry.pairs]
    heapq.heapify(queue)
    while queue and spare and -queue[0][0] > bound:
        _, expert, layer, num = heapq.heappop(queue)
        if left[layer] and num < num_hosts:
            left[layer] -= 1
            spare -= 1
            yield layer, expert
            heapq.heappush(queue, (-busy((layer, expert), num + 1), expert, layer, num + 1))


def _too_small(geometry: ExpertGeometry, hosts: Sequence[HostSlot], room: int) -> str:
    num_pairs = len(geometry.pairs)
    largest = max(slot.room(geometry) for slot in hosts)
    per_host = -(-num_pairs // len(hosts)) * geometry.slice_bytes
    more = f"have {-(-num_pairs // largest)} hosts like the largest of them, or " if largest else ""
    return (
        f"{num_pairs} {geometry.unit_noun} of {geometry.slice_bytes} bytes do not fit: {len(hosts)} hosts have room "
        f"for {room}; {more}give each of {len(hosts)} hosts {per_host} bytes"
    )


def _too_few(
    geometry: ExpertGeometry, hosts: Sequence[HostSlot], room: int, copies: Mapping[Pair, int], wanted: int
) -> str:
    num_pairs = len(geometry.pairs)
    reached = sum(num >= wanted for num in copies.values())
    found = (
        f"num_replicas={wanted} is reached for {reached} of {num_pairs} {geometry.unit_noun}, the others have "
        f"{min(copies.values())}"
    )
    if len(hosts) < wanted:
        return f"{found}: copies lie on distinct hosts and there are {len(hosts)}; have {wanted} hosts"
    return (
        f"{found}: {len(hosts)} hosts have room for {room} copies and {wanted * num_pairs} are wanted; "
        f"add {(wanted * num_pairs - room) * geometry.slice_bytes} bytes"
    )
