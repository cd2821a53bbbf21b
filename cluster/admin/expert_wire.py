"""Placements and loads → messages of llama4_dist.v1; pure."""

from collections.abc import Iterable

from cluster.admin.load_rates import ExpertRate, HostRate
from cluster.operation import PlacementView
from cluster.planning.placement import Pair
from llama4_dist.dispatch.units import slice_of
from llama4_dist.v1 import experts_pb2


def placement_to_proto(view: PlacementView) -> experts_pb2.Placement:
    """Write a whole placement."""
    return experts_pb2.Placement(
        epoch=view.epoch,
        num_experts=view.num_experts,
        moe_layers=view.moe_layers,
        expert_bytes=view.expert_bytes,
        experts=experts_to_proto(view, sorted(view.hosts_of)),
        num_slices=view.num_slices,
        slice_bytes=view.slice_bytes,
    )


def experts_to_proto(view: PlacementView, pairs: Iterable[Pair]) -> list[experts_pb2.ExpertPlacement]:
    """Write the hosts of some units; none where nobody holds one any more."""
    placements = []
    for layer, unit in pairs:
        expert, slice_index = slice_of(unit, view.num_slices)
        hosts = view.hosts_of.get((layer, unit), ())
        placements.append(experts_pb2.ExpertPlacement(layer=layer, expert=expert, slice=slice_index, hosts=hosts))
    return placements


def change_to_proto(seen: PlacementView | None, now: PlacementView) -> experts_pb2.WatchPlacementResponse:
    """Write what is different; everything where nothing was seen, or where the epoch did not rise."""
    event = experts_pb2.WatchPlacementResponse(revision=now.epoch)
    if seen is None or seen.epoch >= now.epoch or geometry(seen) != geometry(now):
        event.snapshot.CopyFrom(placement_to_proto(now))
        return event
    changed = sorted(
        pair for pair in {*seen.hosts_of, *now.hosts_of} if seen.hosts_of.get(pair) != now.hosts_of.get(pair)
    )
    event.delta.base_revision = seen.epoch
    event.delta.changed.extend(experts_to_proto(now, changed))
    return event


def geometry(view: PlacementView) -> tuple[object, ...]:
    """Return what a delta cannot say."""
    return view.num_experts, view.moe_layers, view.expert_bytes, view.num_slices, view.slice_bytes


def expert_rate_to_proto(one: ExpertRate, num_slices: int) -> experts_pb2.ExpertLoad:
    """Write the load of one copy."""
    layer, unit = one.pair
    expert, slice_index = slice_of(unit, num_slices)
    return experts_pb2.ExpertLoad(
        host=one.host, layer=layer, expert=expert, slice=slice_index, rows_per_second=one.rows_per_s, rows=one.rows
    )


def host_rate_to_proto(one: HostRate) -> experts_pb2.HostLoad:
    """Write the load of one host."""
    return experts_pb2.HostLoad(
        host=one.load.host,
        incarnation=one.load.incarnation,
        rows_per_second=one.rows_per_s,
        busy_ratio=one.busy,
        queue_depth=one.load.queue_depth,
        bytes_held=one.load.bytes_held,
        num_resident=one.load.num_resident,
        num_mapped=one.load.num_mapped,
        residency_hits=one.load.residency_hits,
        residency_misses=one.load.residency_misses,
    )
