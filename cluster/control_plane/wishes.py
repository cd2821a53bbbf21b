"""Which expert hosts there shall be after a change: names those that come and go. Pure; places no expert."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count

from cluster.worker import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which hosts there shall be: those that stay, new ones to start, and those that leave."""

    staying: tuple[str, ...]
    joining: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()

    def sparing(self, lost: Collection[str]) -> "Wish":
        """Return the wish without some hosts."""
        return replace(
            self,
            staying=tuple(host for host in self.staying if host not in lost),
            joining=tuple(host for host in self.joining if host not in lost),
        )

    @property
    def hosts(self) -> tuple[str, ...]:
        return (*self.staying, *self.joining)


def scaled(nodes: Mapping[str, str], num_hosts: int, *, taken: Collection[str] = ()) -> Wish:
    """Wish for `num_hosts` hosts, given the node of each that is there; ids that are `taken` are not given anew."""
    missing = num_hosts - len(nodes)
    if missing >= 0:
        return Wish(staying=tuple(sorted(nodes, key=order)), joining=new_names({*nodes, *taken}, missing))
    leaving = leaving_first(nodes)[:-missing]
    return Wish(staying=tuple(host for host in sorted(nodes, key=order) if host not in leaving), leaving=leaving)


def without(hosts: Collection[str], leaving: Collection[str]) -> Wish:
    """Wish for the hosts there are but these."""
    return Wish(
        staying=tuple(host for host in sorted(hosts, key=order) if host not in leaving),
        leaving=tuple(sorted(leaving, key=order)),
    )


def leaving_first(nodes: Mapping[str, str]) -> tuple[str, ...]:
    """Order hosts by who goes first: from the node with the fewest, so that nodes become free; the youngest first."""
    on_node: dict[str, list[str]] = {}
    for host in sorted(nodes, key=order):
        on_node.setdefault(nodes[host], []).append(host)
    fewest_first = sorted(
        on_node.items(), key=lambda item: (len(item[1]), [-number for number in order(item[1][-1])[:1]])
    )
    return tuple(host for _, hosts in fewest_first for host in reversed(hosts))


def new_names(taken: Collection[str], num: int) -> tuple[str, ...]:
    """Return the lowest free host ids."""
    names: Iterable[str] = (f"{Role.EXPERT}-{index}" for index in count())
    free = (name for name in names if name not in taken)
    return tuple(next(free) for _ in range(num))


def likely_nodes(nodes: Mapping[str, str], joining: Collection[str]) -> dict[str, str]:
    """Add to the nodes of hosts that are there a guess for those to start: each where there are fewest by then."""
    nums = Counter(nodes.values())
    likely = dict(nodes)
    for host in joining:
        likely[host] = min(nums, key=lambda node: (nums[node], node), default="")
        nums[likely[host]] += 1
    return likely


def order(host: str) -> tuple[int, str]:
    """Sort by the number at the end of a host id."""
    _, _, number = host.rpartition("-")
    return (int(number) if number.isdigit() else -1, host)
