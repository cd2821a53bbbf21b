"""Which hosts hold which expert slice: an immutable table per epoch; it knows neither links nor tensors."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

Pair = tuple[int, int]  # (layer, unit); a unit is an expert slice, see `units`


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of an expert slice: the host that holds it, and which life of that host."""

    host: str
    incarnation: int

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("a replica needs a host id; host is empty")


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTable:
    """(layer, unit) to its replicas; the first one is preferred. Checked once, never written to again.

    A unit may be left without a replica after `without`; whoever sends to it then gets `UnavailableError`. Every expert
    is cut into `num_slices` units.
    """

    epoch: int
    replicas: Mapping[Pair, tuple[Replica, ...]]
    num_slices: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", MappingProxyType(dict(self.replicas)))
        if self.num_slices < 1:
            raise ValueError(f"num_slices={self.num_slices}: an expert has at least 1 slice")
        incarnations: dict[str, int] = {}
        for (layer, unit), replicas in self.replicas.items():
            if layer < 0 or unit < 0:
                raise ValueError(f"layer {layer}, unit {unit}: neither may be negative")
            if len({replica.host for replica in replicas}) < len(replicas):
                raise ValueError(f"a host holds two replicas of layer {layer} unit {unit}; it may hold one")
            for replica in replicas:
                known = incarnations.setdefault(replica.host, replica.incarnation)
                if known != replica.incarnation:
                    raise ValueError(
                        f"host {replica.host!r} appears with incarnations {known} and {replica.incarnation};"
                        " a table knows one"
                    )

    @cached_property
    def incarnations(self) -> Mapping[str, int]:
        """The incarnation of each host the table names."""
        return {replica.host: replica.incarnation for replicas in self.replicas.values() for replica in replicas}

    @cached_property
    def hosts(self) -> frozenset[str]:
        return frozenset(self.incarnations)

    @cached_property
    def by_layer(self) -> Mapping[int, Mapping[int, tuple[Replica, ...]]]:
        """The same entries as layer to unit to replicas."""
        layers: dict[int, dict[int, tuple[Replica, ...]]] = {}
        for (layer, unit), replicas in sorted(self.replicas.items()):
            layers.setdefault(layer, {})[unit] = replicas
        return layers

    def without(self, *hosts: str) -> "RoutingTable":
        """Return this table without the replicas on `hosts`; the epoch stays: a local mask."""
        return self._with(
            {pair: tuple(one for one in replicas if one.host not in hosts) for pair, replicas in self.replicas.items()}
        )

    def with_replicas(self, extra: Mapping[Pair, Replica]) -> "RoutingTable":
        """Return this table with one more replica of some units, after those they have; the epoch stays."""
        more = {pair: (*self.replicas.get(pair, ()), replica) for pair, replica in extra.items()}
        return self._with({**self.replicas, **more})

    def without_pairs(self, host: str, pairs: Collection[Pair]) -> "RoutingTable":
        """Return this table without the replicas of `pairs` on `host`; the epoch stays."""
        left = {pair: tuple(one for one in self.replicas[pair] if one.host != host) for pair in pairs}
        return self._with({**self.replicas, **left})

    def _with(self, replicas: Mapping[Pair, tuple[Replica, ...]]) -> "RoutingTable":
        return RoutingTable(epoch=self.epoch, replicas=replicas, num_slices=self.num_slices)
