"""Says what differs between two placements: copies to make and to let go; it does not judge whether that pays."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.planning.placement import HostSlot, Pair

HostsOf = Mapping[Pair, Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A copy to be made on `target`; `source` holds one to compare with, None if nobody does."""

    pair: Pair
    source: str | None
    target: str


def moves_between(before: HostsOf, after: HostsOf) -> tuple[Move, ...]:
    """List the copies to make. Sources are hosts that stay holders, where there are some, and take turns."""
    asked: Counter[str] = Counter()

    def moves() -> Iterator[Move]:
        for pair, hosts in sorted(after.items()):
            for target in sorted(set(hosts) - set(before[pair])):
                staying = [host for host in before[pair] if host in hosts] or before[pair]
                source = min(staying, key=lambda host: (asked[host], host), default=None)
                if source is not None:
                    asked[source] += 1
                yield Move(pair=pair, source=source, target=target)

    return tuple(moves())


def released_by(hosts: Iterable[str], before: HostsOf, after: HostsOf) -> dict[str, tuple[Pair, ...]]:
    """Return what each of the hosts holds no longer; hosts that let nothing go are left out."""
    gone: dict[str, list[Pair]] = {host: [] for host in sorted(hosts)}
    for pair, on in sorted(before.items()):
        for host in set(on) - set(after[pair]):
            if host in gone:
                gone[host].append(pair)
    return {host: tuple(pairs) for host, pairs in gone.items() if pairs}


def crowded_pairs(slots: Sequence[HostSlot], after: HostsOf, limits: Mapping[Pair, int]) -> list[Pair]:
    """Return the pairs with more copies on one node than there need be."""
    node_of = {slot.host: slot.node for slot in slots}
    return [
        pair for pair, hosts in after.items() if max(Counter(node_of[host] for host in hosts).values()) > limits[pair]
    ]


def crowded(slots: Sequence[HostSlot], after: HostsOf, limits: Mapping[Pair, int]) -> tuple[str, ...]:
    """Warn of such pairs: the loss of a node takes more of their copies than it need."""
    pairs = crowded_pairs(slots, after, limits)
    if not pairs:
        return ()
    return (
        f"{len(pairs)} of {len(after)} experts have copies that share a node, the first is (layer, expert) "
        f"{min(pairs)}: the other nodes have no memory left for them; add some there",
    )
