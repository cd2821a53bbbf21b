"""Decides which expert host holds which (layer, unit): a pure function of sizes, without Ray, torch or sockets.

A unit is an expert, or a slice of one where experts are cut: the slices of an expert are placed one by one.

The copies of all experts form a line on which each host owns an interval as long as its quota (systematic sampling).
Copy k of a pair lies one whole model further along the line than copy k-1, so a host whose quota is at most one model
never gets a pair twice, and neither does a node. Pairs are numbered expert by expert with layers innermost, so an
interval covers every layer evenly: a host holds floor or ceil of its share in each layer, whatever the number of hosts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from cluster.planning.shares import share_out
from llama4_dist.checkpoint.expert_slices import slice_bounds
from llama4_dist.dispatch.routing_table import Replica, RoutingTable

Pair = tuple[int, int]  # (layer, unit): a unit is an expert slice, or an expert where these are whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGeometry:
    """What is to be placed: `num_experts` in each of `moe_layers`, every one cut into `num_slices` units.

    `expert_bytes` are those of one whole expert of one layer, `slice_bytes` those of its largest slice, which room is
    planned with; left out where experts are whole.
    """

    moe_layers: tuple[int, ...]
    num_experts: int
    expert_width: int  # F
    expert_bytes: int
    num_slices: int = 1
    slice_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.moe_layers or self.num_experts < 1:
            raise ValueError("the model has no routed experts: run it in one process, without expert hosts")
        if self.expert_width < 1 or self.expert_bytes < 1:
            raise ValueError(f"{self.expert_width=} and {self.expert_bytes=} must be at least 1")
        slice_bounds(self.expert_width, self.num_slices)
        if self.num_slices == 1:
            object.__setattr__(self, "slice_bytes", self.expert_bytes)
        if self.slice_bytes < 1:
            raise ValueError(f"{self.num_slices=}: give the bytes of the largest slice")

    @property
    def num_units(self) -> int:
        """How many units a layer has."""
        return self.num_experts * self.num_slices

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every (layer, unit), layers innermost."""
        return tuple((layer, unit) for unit in range(self.num_units) for layer in self.moe_layers)

    @property
    def unit_noun(self) -> str:
        """What a message calls units."""
        return "experts" if self.num_slices == 1 else "expert slices"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSlot:
    """A host that may take experts. `capacity_bytes` None = no limit; `weight` is its speed relative to the others."""

    host: str
    node: str
    capacity_bytes: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"host {self.host!r} has weight {self.weight}: a speed is finite and above 0")
        if self.capacity_bytes is not None and self.capacity_bytes < 0:
            raise ValueError(f"host {self.host!r} has capacity_bytes={self.capacity_bytes}: give 0 or more, or None")

    def room(self, geometry: ExpertGeometry) -> int:
        """Return how many units fit, never more than there are."""
        most = len(geometry.pairs)
        return most if self.capacity_bytes is None else min(most, self.capacity_bytes // geometry.slice_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Hosts of each (layer, expert), the preferred one first."""

    hosts_of: Mapping[Pair, tuple[str, ...]]

    def held_by(self, host: str) -> tuple[Pair, ...]:
        """Return what one host maps, in order."""
        return tuple(sorted(pair for pair, hosts in self.hosts_of.items() if host in hosts))

    def without(self, hosts: Collection[str]) -> "Placement":
        """Return the placement as it is once some hosts are gone; a pair may be left with none."""
        return Placement(
            hosts_of={pair: tuple(host for host in on if host not in hosts) for pair, on in self.hosts_of.items()}
        )


def place(geometry: ExpertGeometry, hosts: Sequence[HostSlot], *, num_replicas: int = 1) -> Placement:
    """Spread `num_replicas` copies of every expert over distinct hosts, evenly in every layer.

    Deterministic: the order of `hosts` does not matter. Copies lie on distinct nodes too where no node holds more than
    its 1/`num_replicas` share; a host's share is in proportion to its weight. Raises ValueError when it cannot fit.
    """
    check_hosts(hosts)
    if not 1 <= num_replicas <= len(hosts):
        raise ValueError(
            f"{num_replicas=} needs as many hosts and there are {len(hosts)}: add hosts or ask for fewer copies"
        )
    pairs = geometry.pairs
    quotas = _quotas(geometry, hosts, total=len(pairs) * num_replicas)
    line = [
        slot.host for slot in sorted(hosts, key=lambda slot: (slot.node, slot.host)) for _ in range(quotas[slot.host])
    ]
    copies = {pair: [line[at + k * len(pairs)] for k in range(num_replicas)] for at, pair in enumerate(pairs)}
    return Placement(hosts_of=_prefer_evenly(copies))


def routing_table(
    placement: Placement, *, epoch: int, incarnations: Mapping[str, int], num_slices: int
) -> RoutingTable:
    """Write a placement down as the table that dispatchers read."""
    return RoutingTable(
        epoch=epoch,
        replicas={
            pair: tuple(Replica(host, incarnations[host]) for host in hosts)
            for pair, hosts in placement.hosts_of.items()
        },
        num_slices=num_slices,
    )


def check_hosts(hosts: Sequence[HostSlot]) -> None:
    """Refuse no hosts, and two of the same name."""
    if not hosts:
        raise ValueError("there is no expert host: ask for at least one")
    if len({slot.host for slot in hosts}) < len(hosts):
        raise ValueError(f"host ids must differ: {sorted(slot.host for slot in hosts)}")


def _quotas(geometry: ExpertGeometry, hosts: Sequence[HostSlot], *, total: int) -> dict[str, int]:
    """Copies per host: in proportion to weight as far as the capacities allow; no host holds a pair twice."""
    limits = {slot.host: slot.room(geometry) for slot in hosts}
    if sum(limits.values()) < total:
        raise ValueError(
            f"{total} {geometry.unit_noun} of {geometry.slice_bytes} bytes do not fit: the hosts have room for "
            f"{sum(limits.values())}; add hosts, memory, or ask for fewer copies"
        )
    return share_out(total, limits=limits, weights={slot.host: slot.weight for slot in hosts}, held={})


def _prefer_evenly(copies: Mapping[Pair, Sequence[str]]) -> dict[Pair, tuple[str, ...]]:
    """Order each pair's hosts so that the preferred ones are spread evenly in every layer."""
    preferred: dict[tuple[int, str], int] = {}
    ordered: dict[Pair, tuple[str, ...]] = {}
    for pair, hosts in sorted(copies.items()):
        layer = pair[0]
        first = min(hosts, key=lambda host: (preferred.get((layer, host), 0), host))
        preferred[layer, first] = preferred.get((layer, first), 0) + 1
        ordered[pair] = (first, *(host for host in hosts if host != first))
    return ordered
