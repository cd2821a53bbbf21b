"""Puts what a controller knows into the records that an operator sees. Asks nobody and decides nothing."""

from collections.abc import Iterable

from cluster.control_plane.wishes import order
from cluster.operation import PlacementView
from cluster.planning.placement import ExpertGeometry
from cluster.worker import Role, State, Topology, WorkerStatus


def in_order(statuses: Iterable[WorkerStatus], missing: Iterable[tuple[Role, str]]) -> tuple[WorkerStatus, ...]:
    """Return workers by role and number, with those that are gone as LOST."""
    lost = (WorkerStatus(worker=worker, role=role, state=State.LOST) for role, worker in missing)
    return tuple(sorted((*statuses, *lost), key=lambda one: (one.role, order(one.worker))))


def placement_view(geometry: ExpertGeometry, topology: Topology) -> PlacementView:
    """Say who holds what."""
    return PlacementView(
        epoch=topology.epoch,
        num_experts=geometry.num_experts,
        moe_layers=geometry.moe_layers,
        expert_bytes=geometry.expert_bytes,
        hosts_of=topology.placement.hosts_of,
        num_slices=geometry.num_slices,
        slice_bytes=geometry.slice_bytes,
    )
