"""Placements and loads that an admin server answers, as plain data; pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llama4_dist.v1 import experts_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """The load of one copy of an expert; `rows` since its host began."""

    host: str
    layer: int
    expert: int
    rows_per_s: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    """The load of one expert host; `busy` is the share of the window it computed."""

    host: str
    incarnation: int
    rows_per_s: float
    busy: float
    queue_depth: int
    bytes_held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """All loads over one window."""

    window_s: float
    hosts: tuple[HostLoad, ...]
    experts: tuple[ExpertLoad, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Who holds what in one epoch: the hosts of each (layer, expert), the preferred one first."""

    epoch: int
    num_experts: int
    moe_layers: tuple[int, ...]
    expert_bytes: int
    hosts_of: Mapping[tuple[int, int], tuple[str, ...]]


def expert_loads(messages: Iterable[experts_pb2.ExpertLoad]) -> tuple[ExpertLoad, ...]:
    """Read loads of experts."""
    return tuple(
        ExpertLoad(host=one.host, layer=one.layer, expert=one.expert, rows_per_s=one.rows_per_second, rows=one.rows)
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
        hosts_of={(one.layer, one.expert): tuple(one.hosts) for one in message.experts},
    )


def changed_placement(seen: Placement, changed: Iterable[experts_pb2.ExpertPlacement], revision: int) -> Placement:
    """Apply a delta."""
    hosts_of = {**seen.hosts_of, **{(one.layer, one.expert): tuple(one.hosts) for one in changed}}
    return Placement(
        epoch=revision,
        num_experts=seen.num_experts,
        moe_layers=seen.moe_layers,
        expert_bytes=seen.expert_bytes,
        hosts_of={pair: hosts for pair, hosts in hosts_of.items() if hosts},
    )
