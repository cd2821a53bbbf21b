"""Puts what a controller knows into the records that an operator sees. Asks nobody and decides nothing."""

from collections.abc import Iterable

from cluster.control_plane.wishes import Wish, order
from cluster.operation import Change, PlacementView
from cluster.planning.balance import PlacementPlan
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


def change_of(wish: Wish, topology: Topology, plan: PlacementPlan) -> Change:
    """Say in figures what a plan does."""
    return Change(
        hosts_before=len(topology.hosts),
        hosts_after=len(wish.hosts),
        added=wish.joining,
        removed=wish.leaving,
        freed_nodes=freed_nodes(wish, topology),
        num_moves=len(plan.moves),
        num_bytes=plan.num_bytes,
        balance_before=plan.balance_before,
        balance_after=plan.balance_after,
    )


def freed_nodes(wish: Wish, topology: Topology) -> tuple[str, ...]:
    """Return the nodes on which nobody is left when a wish has come true."""
    node_of = {host: address.node for host, address in topology.hosts.items()}
    staying = {node_of[host] for host in wish.staying if host in node_of}
    return tuple(sorted({node_of[host] for host in wish.leaving if host in node_of} - staying))
