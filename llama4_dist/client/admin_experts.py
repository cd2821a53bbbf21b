"""Placements and loads that an admin server answers, as plain data; pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llama4_dist.v1 import experts_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """The load of one copy of an expert, or of a slice of one; `rows` since its host began."""

    host: str
    layer: int
    expert: int
    rows_per_s: float
    rows: int
    slice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    """The load of one expert host; `busy` is the share of the window it computed.

    `num_resident` of the slices it holds are in memory and `num_mapped` are not, where a bound was set.
    """

    host: str
    incarnation: int
    rows_per_s: float
    busy: float
    queue_depth: int
    bytes_held: int
    num_resident: int = 0
    num_mapped: int = 0
    residency_hits: int = 0
    residency_misses: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """All loads over one window."""

    window_s: float
    hosts: tuple[HostLoad, ...]
    experts: tuple[ExpertLoad, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Who holds what in one epoch: the hosts of each (layer, unit), the preferred one first.

    Unit expert · `num_slices` + slice is one slice of an expert; where experts are whole it is the expert.
    """

    epoch: int
    num_experts: int
    moe_layers: tuple[int, ...]
    expert_bytes: int
    hosts_of: Mapping[tuple[int, int], tuple[str, ...]]
    num_slices: int = 1
    slice_bytes: int = 0


def expert_loads(messages: Iterable[experts_pb2.ExpertLoad]) -> tuple[ExpertLoad, ...]:
    """Read loads of experts."""
    return tuple(
        ExpertLoad(
            host=one.host,
            layer=one.layer,
            expert=one.expert,
            rows_per_s=one.rows_per_second,
            rows=one.rows,
            slice=one.slice,
        )
        for one in messages
    )


def host_loads(messages: Iterable[experts_pb2.HostLoad]) -> tuple[HostLoad, ...]:
    """Read loads of hosts."""
    return tuple(
        HostLoad(
            host=one.host,
            incarnation=one.incarnation,
            rows_per_s=one.rows_per_second,
            busy=one.busy_ratio,
            queue_depth=one.queue_depth,
            bytes_held=one.bytes_held,
            num_resident=one.num_resident,
            num_mapped=one.num_mapped,
            residency_hits=one.residency_hits,
            residency_misses=one.residency_misses,
        )
        for one in messages
    )


def placement_from_proto(message: experts_pb2.Placement) -> Placement:
    """Read a placement."""
    return Placement(
        epoch=message.epoch,
        num_experts=message.num_experts,
        moe_layers=tuple(message.moe_layers),
        expert_bytes=message.expert_bytes,
        hosts_of=_hosts_of(message.experts, message.num_slices),
        num_slices=message.num_slices or 1,  # an older server knows no slices
        slice_bytes=message.slice_bytes or message.expert_bytes,
    )


def changed_placement(seen: Placement, changed: Iterable[experts_pb2.ExpertPlacement], revision: int) -> Placement:
    """Apply a delta."""
    hosts_of = {**seen.hosts_of, **_hosts_of(changed, seen.num_slices)}
    return replace(seen, epoch=revision, hosts_of={pair: hosts for pair, hosts in hosts_of.items() if hosts})


def _hosts_of(
    messages: Iterable[experts_pb2.ExpertPlacement], num_slices: int
) -> dict[tuple[int, int], tuple[str, ...]]:
    return {(one.layer, one.expert * (num_slices or 1) + one.slice): tuple(one.hosts) for one in messages}
