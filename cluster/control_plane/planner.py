"""Plans placements of one cluster with the loads measured there; asks no host and changes nothing."""

import threading
from collections.abc import Mapping, Sequence

from cluster.control_plane.load_meter import LoadMeter
from cluster.control_plane.wishes import Wish
from cluster.operation import HostLoad, Kind
from cluster.plan import ClusterPlan
from cluster.planning.balance import PlacementPlan, plan_placement, worth_moving
from cluster.planning.placement import HostSlot, Placement
from cluster.planning.policy import PlanPolicy
from llama4_dist.errors import PreconditionError


class Planner:
    """Thread-safe."""

    def __init__(self, plan: ClusterPlan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._meter = LoadMeter()

    def note(self, readings: Sequence[HostLoad]) -> None:
        """Take readings of the hosts' counters for the plans to come."""
        with self._lock:
            self._meter.note(readings)

    def plan(self, wish: Wish, nodes: Mapping[str, str], *, current: Placement | None, kind: Kind) -> PlacementPlan:
        """Plan the placement on the hosts of a wish, given their nodes; PreconditionError where it does not fit."""
        capacity_bytes = self._plan.host_capacity_bytes
        slots = [HostSlot(host=host, node=nodes[host], capacity_bytes=capacity_bytes) for host in wish.hosts]
        policy = PlanPolicy(num_replicas=self._plan.num_replicas, rebalance=kind is Kind.REBALANCE)
        with self._lock:
            loads = self._meter.loads(self._plan.geometry)
        try:
            return plan_placement(self._plan.geometry, slots, current=current, loads=loads, policy=policy)
        except ValueError as error:
            raise PreconditionError(str(error)) from None

    def pays(self, kind: Kind, plan: PlacementPlan) -> bool:
        """Say whether a plan is worth its bytes; only a rebalancing has to be."""
        with self._lock:
            prices = self._meter.prices()
        return kind is not Kind.REBALANCE or (bool(plan.moves) and worth_moving(plan, **prices))
