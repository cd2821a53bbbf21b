"""Which host holds which slice of which expert: an immutable table per epoch; it knows neither links nor tensors."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRef:
    """Columns [start, stop) of an expert's FFN width, on one incarnation of one host."""

    host: str
    incarnation: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("a slice needs a host id; host is empty")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"slice [{self.start}, {self.stop}) on {self.host!r} is empty or reversed")


@dataclass(frozen=True, slots=True)
class Replica:
    """One complete copy of an expert: slices in ascending order; their outputs are added in this order."""

    slices: tuple[SliceRef, ...]

    def __post_init__(self) -> None:
        if not self.slices:
            raise ValueError("a replica needs at least one slice")
        if self.slices[0].start != 0:
            raise ValueError(f"the first slice starts at {self.slices[0].start}; it must start at 0")
        for left, right in zip(self.slices, self.slices[1:], strict=False):
            if left.stop != right.start:
                raise ValueError(
                    f"slices leave a gap or overlap: one stops at {left.stop}, the next starts at {right.start}"
                )
        if len({ref.host for ref in self.slices}) < len(self.slices):
            raise ValueError("two slices of one replica lie on the same host; merge them into one slice")

    def on(self, host: str) -> bool:
        return any(ref.host == host for ref in self.slices)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTable:
    """(layer, expert) to its replicas; the first replica is the preferred one. Checked once, never written to again.

    A host holds at most one range of an expert, because a frame names the expert alone. An expert may be left without
    a replica after `without`; whoever sends to it then gets `UnavailableError`.
    """

    epoch: int
    replicas: Mapping[tuple[int, int], tuple[Replica, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", MappingProxyType(dict(self.replicas)))
        incarnations: dict[str, int] = {}
        for ref in self._slices():
            if incarnations.setdefault(ref.host, ref.incarnation) != ref.incarnation:
                raise ValueError(
                    f"host {ref.host!r} appears with incarnations {incarnations[ref.host]} and {ref.incarnation};"
                    " a table knows one"
                )
        for (layer, expert), replicas in self.replicas.items():
            _check_expert(layer, expert, replicas)

    @cached_property
    def incarnations(self) -> Mapping[str, int]:
        """The incarnation of each host the table names."""
        return {ref.host: ref.incarnation for ref in self._slices()}

    @cached_property
    def hosts(self) -> frozenset[str]:
        return frozenset(self.incarnations)

    @cached_property
    def by_layer(self) -> Mapping[int, Mapping[int, tuple[Replica, ...]]]:
        """The same entries as layer to expert to replicas."""
        layers: dict[int, dict[int, tuple[Replica, ...]]] = {}
        for (layer, expert), replicas in sorted(self.replicas.items()):
            layers.setdefault(layer, {})[expert] = replicas
        return layers

    def without(self, *hosts: str) -> "RoutingTable":
        """Return this table with every replica that touches one of `hosts` gone; the epoch stays: a local mask."""
        left = {
            key: tuple(replica for replica in replicas if not any(replica.on(host) for host in hosts))
            for key, replicas in self.replicas.items()
        }
        return RoutingTable(epoch=self.epoch, replicas=left)

    def with_replicas(self, extra: Mapping[tuple[int, int], Replica]) -> "RoutingTable":
        """Return this table with one more replica of some experts, after those they have; the epoch stays."""
        more = {key: (*self.replicas.get(key, ()), replica) for key, replica in extra.items()}
        return RoutingTable(epoch=self.epoch, replicas={**self.replicas, **more})

    def without_pairs(self, host: str, pairs: Collection[tuple[int, int]]) -> "RoutingTable":
        """Return this table without the replicas of `pairs` that touch `host`; the epoch stays."""
        left = {key: tuple(one for one in self.replicas[key] if not one.on(host)) for key in pairs}
        return RoutingTable(epoch=self.epoch, replicas={**self.replicas, **left})

    def _slices(self) -> Iterator[SliceRef]:
        for replicas in self.replicas.values():
            for replica in replicas:
                yield from replica.slices


def _check_expert(layer: int, expert: int, replicas: tuple[Replica, ...]) -> None:
    """Refuse replicas of different widths, and a host that holds two different ranges of the expert."""
    if layer < 0 or expert < 0:
        raise ValueError(f"layer {layer}, expert {expert}: neither may be negative")
    ranges: dict[str, tuple[int, int]] = {}
    for replica in replicas:
        if replica.slices[-1].stop != replicas[0].slices[-1].stop:
            raise ValueError(f"replicas of layer {layer} expert {expert} differ in width")
        for ref in replica.slices:
            if ranges.setdefault(ref.host, (ref.start, ref.stop)) != (ref.start, ref.stop):
                raise ValueError(
                    f"host {ref.host!r} holds two ranges of layer {layer} expert {expert}; it may hold one"
                )
