"""A simulated attention worker: the real engine core, dispatcher, links to hosts and switching, without threads."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from cluster.data_plane.attention_worker import AttentionWorker
from cluster.data_plane.topology_follower import TopologyFollower
from cluster.worker import Adopted, HostAddress, Location, Role, State, Topology, WorkerConfig, WorkerStatus
from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.links.link import Link
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.engine.engine import EngineCore
from llama4_dist.errors import LinkDownError
from llama4_dist.request import TokenOutput
from tests.simulation.links import join
from tests.simulation.tiny_model import WIDTH, engine_core, referee

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")
STEP_S = 0.002  # of a step without waiting
LONGEST_STEP_S = 200.0


def between_steps(action: Callable[[], T]) -> T:
    """Stand in for the engine's thread: whoever asks comes between two steps."""
    return action()


class SimAttention(AttentionWorker):
    """One attention worker, which never dies here."""

    def __init__(self, config: WorkerConfig, world: "World") -> None:
        super().__init__(config, Location(node="node-0", address="simulated"))
        self.world = world
        self.name = config.worker
        self.role = Role.ATTENTION
        self.alive = True
        self.stopped = False
        self.is_serving = False
        self.lost_for: list[str] = []
        self.core: EngineCore

    @property
    def incarnation(self) -> int:
        return self._presence.incarnation

    def load(self) -> None:
        plan = self.world.plan
        dispatcher = Dispatcher(
            worker=self.name,
            incarnation=self.incarnation,
            table=RoutingTable(epoch=0, replicas={}),
            links={},
            width=WIDTH,
            dtype=torch.float32,
            checks=CrossCheck(every=plan.check_every, referee=referee),
            on_lost=self._note_lost,
            clock=self.world.clock,
        )
        self._follower = TopologyFollower(
            self.name,
            self._epochs,
            dispatcher_of=lambda on_lost: dispatcher,
            dial=self._dial,
            between_steps=between_steps,
        )
        self.core = engine_core(
            dispatcher,
            num_blocks=plan.num_blocks,
            clock=self.world.clock,
            max_num_batched_tokens=plan.max_tokens_per_step,
            max_num_seqs=3,
            expert_timeout_s=plan.expert_timeout_s,
        )

    def serve(self) -> str:
        self.is_serving = True
        self._presence.state = State.READY
        return f"{self.name}/{self.incarnation}"

    def publish(self, topology: Topology) -> Adopted:
        adopted = super().publish(topology)
        self.world.judge.on_adopted(self, topology)
        return adopted

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            worker=self.name,
            role=Role.ATTENTION,
            state=self._presence.state,
            incarnation=self.incarnation,
            node=self._presence.location.node,
            addresses=(f"{self.name}/{self.incarnation}",) if self.is_serving else (),
            epoch=self.epoch,
        )

    def close(self) -> None:
        self.kill()

    def kill(self, *, silently: bool = False) -> None:
        self.alive = False

    @property
    def dispatcher(self) -> Dispatcher:
        return self._follower.dispatcher

    @property
    def epoch(self) -> int:
        return self._epochs.epoch

    def step(self) -> list[TokenOutput]:
        """Run one step of the engine; hosts may die, stop and go on meanwhile."""
        clock = self.world.clock
        clock.deadline = clock.now + LONGEST_STEP_S
        try:
            return self.core.step()
        finally:
            clock.deadline = None
            clock.advance(STEP_S)

    def redial(self) -> None:
        """Try the hosts that are down once, as the links' own thread does."""
        self._follower.links._dial_again()

    def release(self) -> None:
        """Give up every link when the world ends."""
        if self.is_serving:
            self.dispatcher.close()

    def _note_lost(self, host: str, incarnation: int, reason: str) -> None:
        self.world.note(f"{self.name} gives {host}/{incarnation} up: {reason}")
        self.world.judge.on_lost(self, host, incarnation, reason)
        self._follower.links.lost(host, incarnation, reason)

    def _dial(self, address: HostAddress) -> Link:
        host = self.world.host_called(address.host)
        if host is None or not host.alive or host.stopped or host.address() is None:
            raise LinkDownError(f"{address.host} does not answer")
        host.admit(self.name, self.incarnation)
        to_host, to_worker = self.world.link_faults(host)
        return join(host, self.name, self.incarnation, to_host, to_worker)
