"""Turns plain classes into Ray actors: the only file with `ray.remote`. Decides nothing.

Ray carries calls that start, ask and stop workers; no tensor of the token loop passes through it.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import ray

from cluster.control_plane.controller import Controller
from cluster.data_plane.short_slices import take_short_slices
from cluster.data_plane.unhurried import unhurried
from cluster.handle import Handle
from cluster.plan import ClusterPlan
from cluster.standing import CONTROLLER
from cluster.worker import Location, Role, WorkerConfig
from llama4_dist.telemetry.logs import configure_logging
from llama4_dist.telemetry.settings import Telemetry
from llama4_dist.telemetry.tracing import configure_tracing

MACHINE_VARIABLE = "LLAMA4_DIST_MACHINE"


def this_node() -> Location:
    """Say where this process runs, in Ray's words; a pod is told its machine by LLAMA4_DIST_MACHINE."""
    return Location(
        node=ray.get_runtime_context().get_node_id(),
        address=ray.util.get_node_ip_address(),
        machine=os.environ.get(MACHINE_VARIABLE, ""),
    )


class Actor:
    """A plain class in a process of its own.

    Its module is imported when it is built. Ray loads the actor's class wherever a handle to it arrives, and with the
    plain class would come torch: the controller's process does without.
    """

    plain: Any = None

    def be_observed(self, telemetry: Telemetry, worker: str, role: Role) -> None:
        """Log to stderr, which Ray keeps in a file of the session, one per process; trace where that is asked for."""

        def fields() -> dict[str, object]:
            epoch = getattr(self.plain, "epoch", None)  # a host has none
            return {"worker": worker, "role": str(role)} | ({} if epoch is None else {"epoch": epoch})

        configure_logging(telemetry.log_level, telemetry.log_format, of_process=fields)
        configure_tracing(telemetry, instance=worker, role=role)

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the plain class."""
        return getattr(self.plain, method)(*arguments)

    def leave(self) -> None:
        """End this process."""
        os._exit(0)


@ray.remote
class ExpertHostActor(Actor):
    """An expert host in a Ray actor."""

    def __init__(self, config: WorkerConfig) -> None:
        # torch takes a second of a core that others serve on
        unhurried(lambda: import_module("cluster.data_plane.expert_host"))
        from cluster.data_plane.expert_host import ExpertHost
        from llama4_dist.dispatch.fault_points import FaultPoints

        self.be_observed(config.telemetry, config.worker, config.role)
        take_short_slices()
        self.plain = ExpertHost(config, this_node(), faults=FaultPoints() if config.armable else None)


@ray.remote
class AttentionWorkerActor(Actor):
    """An attention worker in a Ray actor, or the leader of an attention group."""

    def __init__(self, config: WorkerConfig) -> None:
        from cluster.data_plane.attention_worker import AttentionWorker
        from cluster.data_plane.group_leader import GroupLeader

        self.be_observed(config.telemetry, config.worker, config.role)
        take_short_slices()
        self.plain = GroupLeader(config, this_node()) if config.leads else AttentionWorker(config, this_node())


@ray.remote
class StageWorkerActor(Actor):
    """A member of an attention group in a Ray actor."""

    def __init__(self, config: WorkerConfig) -> None:
        from cluster.data_plane.stage_worker import StageWorker

        self.be_observed(config.telemetry, config.worker, config.role)
        take_short_slices()
        self.plain = StageWorker(config, this_node())


@ray.remote
class ControllerActor(Actor):
    """The controller in a Ray actor."""

    def __init__(self, plan: ClusterPlan, workers: Sequence[Handle]) -> None:
        self.be_observed(plan.telemetry, CONTROLLER, Role.CONTROLLER)
        self.plain = Controller(plan, workers, this_node())


ACTORS: Mapping[Role, Any] = {
    Role.EXPERT: ExpertHostActor,
    Role.ATTENTION: AttentionWorkerActor,
    Role.STAGE: StageWorkerActor,
    Role.CONTROLLER: ControllerActor,
}
