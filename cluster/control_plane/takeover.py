"""What a new controller learns of a cluster that serves, from its workers alone. Changes nothing."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cluster.control_plane.members import Members
from cluster.control_plane.wishes import order
from cluster.handle import Handle
from cluster.planning.placement import Pair, Placement
from cluster.worker import HostAddress, Role, State, Topology, WorkerStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """What is there: the newest topology that a follower knows, or what hosts hold where none is left.

    `unknown` are attention workers and stages that did not say what they follow, or do not work yet: nobody can tell
    what they would do, so they have to go. `behind` are those that follow an older topology.
    """

    topology: Topology
    engines: Mapping[str, str]
    behind: tuple[Handle, ...]
    unknown: tuple[Handle, ...]
    statuses: Mapping[str, WorkerStatus]  # of those that answered


def take_stock(members: Members, timeout_s: float, *, controller: int) -> Stock:
    """Ask every worker what it knows, in the name of a controller, whose elders attention workers take no topology of.

    It takes up to three times `timeout_s` if some are silent.
    """
    followers = members.followers
    statuses, _ = members.try_each(members.all, "status", timeout_s=timeout_s)
    told, _ = members.try_each(followers, "topology", controller, timeout_s=timeout_s)
    addresses_of = {
        worker: statuses[worker].addresses
        for worker, topology in told.items()
        if topology is not None and worker in statuses and statuses[worker].addresses
    }
    if addresses_of:
        newest = max((told[worker] for worker in addresses_of), key=lambda topology: topology.epoch)
    else:
        addresses, _ = members.try_each(members.of(Role.EXPERT), "address", timeout_s=timeout_s)
        newest = held_topology(statuses.values(), addresses)
    return Stock(
        topology=newest,
        engines={
            one.worker: addresses_of[one.worker][0] for one in members.of(Role.ATTENTION) if one.worker in addresses_of
        },
        behind=tuple(one for one in followers if one.worker in addresses_of and told[one.worker].epoch < newest.epoch),
        unknown=tuple(one for one in followers if one.worker not in addresses_of),
        statuses=statuses,
    )


def held_topology(statuses: Iterable[WorkerStatus], addresses: Mapping[str, HostAddress | None]) -> Topology:
    """Describe what ready hosts hold as the first epoch, which no attention worker follows yet."""
    hosts: dict[str, HostAddress] = {}
    holders: dict[Pair, list[str]] = defaultdict(list)
    for status in sorted(statuses, key=lambda one: order(one.worker)):
        address = addresses.get(status.worker)
        if status.role is Role.EXPERT and status.state is State.READY and address is not None and status.experts:
            hosts[status.worker] = address
            for pair in status.experts:
                holders[pair].append(status.worker)
    return Topology(
        epoch=1 if hosts else 0,
        # Copies of neighbours begin with different hosts, so that the preferred ones are spread.
        placement=Placement(hosts_of={pair: _turned(holders[pair], pair) for pair in sorted(holders)}),
        hosts=hosts,
    )


def strangers(topology: Topology, statuses: Mapping[str, WorkerStatus]) -> set[str]:
    """Return the expert hosts that a topology does not name, or names in another life."""
    return {
        worker
        for worker, status in statuses.items()
        if status.role is Role.EXPERT
        and (worker not in topology.hosts or topology.hosts[worker].incarnation != status.incarnation)
    }


def _turned(hosts: Collection[str], pair: Pair) -> tuple[str, ...]:
    at = sum(pair) % len(hosts)
    return (*tuple(hosts)[at:], *tuple(hosts)[:at])
