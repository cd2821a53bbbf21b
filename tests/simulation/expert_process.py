"""A simulated expert host: the real server and the real host's methods over experts in whole numbers; may die anywhere.

Only what needs a checkpoint, a thread or a socket is replaced.
"""

import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cluster.data_plane.expert_host import ExpertHost
from cluster.planning.placement import Pair
from cluster.worker import HostAddress, Location, Role, State, WorkerConfig, WorkerStatus
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.handshake import Hello, HostIdentity
from llama4_dist.dispatch.handshake import Role as LinkRole
from llama4_dist.errors import LinkDownError
from llama4_dist.model.expert_cut import ExpertCut
from llama4_dist.model.expert_store import ExpertStore
from tests.simulation.links import LIMITS, HostsEnd
from tests.simulation.tiny_model import MODULUS, NUM_EXPERTS, NUM_LAYERS, WIDTH, compute

if TYPE_CHECKING:
    from tests.simulation.world import World

EXPERT_BYTES = 10


class HostDied(BaseException):
    """Unwinds what a host was doing when it was killed; not an Exception, so that nothing of the host handles it."""


class TinyStore(ExpertStore):
    """The real store's rules for what comes and goes, over experts that need no weights."""

    def __init__(self, host: "SimHost", capacity_bytes: int | None) -> None:
        self._host = host
        self._capacity_bytes = capacity_bytes
        self._changing = threading.Lock()
        self._adopted: set[Pair] = set()
        self._held: frozenset[Pair] = frozenset()
        self._cut = ExpertCut(bounds=(range(WIDTH),), slice_bytes=(EXPERT_BYTES,), computed_bytes=(EXPERT_BYTES,))
        self.residency = None

    @property
    def holds(self) -> frozenset[Pair]:
        return self._held

    @property
    def adopted(self) -> frozenset[Pair]:
        return frozenset(self._adopted)

    def fingerprint(self, pair: Pair) -> str:
        return f"weights of {pair}"

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        self._host.pass_point("computing")
        if missing := [expert for expert, _ in groups if (layer, expert) not in self._held]:
            raise KeyError(missing)  # as the real one, whose weights are gone
        compute(layer, groups, x_RD, out_RD)
        if self._host.wrong:
            out_RD.copy_(torch.remainder(out_RD + 1, MODULUS))

    def _add(self, pairs: Collection[Pair], progress: Any = None) -> None:
        wanted = set(pairs) - self._held
        self._check_room(wanted)
        self._held |= wanted

    def _remove(self, pairs: Collection[Pair]) -> int:
        self._held -= set(pairs)
        self._adopted.difference_update(pairs)
        return sum(map(self._bytes_of, pairs))


class SimPoints(FaultPoints):
    """Passes the server's fault points on to the world."""

    def __init__(self, host: "SimHost") -> None:
        super().__init__()
        self._host = host

    def hit(self, point: str) -> None:
        if point != "computing":  # the store says so before it computes
            self._host.pass_point(point)


class SimHost(ExpertHost):
    """One life of an expert host."""

    def __init__(self, config: WorkerConfig, world: "World", node: str) -> None:
        super().__init__(config, Location(node=node, address="simulated"))
        self.world = world
        self.name = config.worker
        self.role = Role.EXPERT
        self.alive = True
        self.stopped = False
        self.slow = False
        self.wrong = False
        self.troubled_s = 0.0  # when it last began or ceased to be in trouble
        self.disturbed = False  # was ever stopped, slow, silent or behind a link that loses frames
        self.ends: list[HostsEnd] = []

    @property
    def incarnation(self) -> int:
        return self._presence.incarnation

    def load(self, pairs: Sequence[Pair]) -> HostAddress:
        self._store = TinyStore(self, self._config.capacity_bytes)
        self.add(pairs)
        identity = HostIdentity(
            host=self.name,
            incarnation=self.incarnation,
            model_hash="0" * 64,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
        )
        self._server = ExpertServer(
            identity=identity,
            compute=self._store,
            width=WIDTH,
            dtype=torch.float32,
            limits=LIMITS,
            faults=SimPoints(self),
        )
        self._address = HostAddress(
            host=self.name,
            incarnation=self.incarnation,
            node=self._presence.location.node,
            unix=self.name,
            tcp=self.name,
        )
        self._presence.state = State.READY
        return self._address

    def keep(self, pairs: Sequence[Pair]) -> int:
        self.world.judge.on_let_go(self, self.held - set(pairs))
        return super().keep(pairs)

    def restore(self, pairs: Sequence[Pair]) -> int:
        self.world.judge.on_let_go(self, self.held - set(pairs) - self.adopted)
        return super().restore(pairs)

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            worker=self.name,
            role=Role.EXPERT,
            state=self._presence.state,
            incarnation=self.incarnation,
            node=self._presence.location.node,
            experts=tuple(sorted(self.held)),
        )

    def close(self) -> None:
        """End as a process does that is asked to: its links go down."""
        self.world.judge.on_let_go(self, self.held)
        self.kill()

    @property
    def held(self) -> frozenset[Pair]:
        return self._store.holds if self._store is not None else frozenset()

    @property
    def adopted(self) -> frozenset[Pair]:
        return cast(TinyStore, self._store).adopted if self._store is not None else frozenset()

    @property
    def well(self) -> bool:
        """Whether it answers as it should, now."""
        return self.alive and not self.stopped and not self.slow and self._presence.state is State.READY

    def drive(self) -> None:
        """Run the server until nothing is left to do, or it dies of it."""
        if not self.alive or self.stopped or self._server is None:
            return
        try:
            self._server.poll(0.0)
        except HostDied:
            self.world.note(f"{self.name} ends in the middle")

    def admit(self, worker: str, incarnation: int) -> None:
        """Let the server decide on a new link, as its handshake does."""
        assert self._server is not None
        hello = Hello(
            role=LinkRole.ATTENTION, id=worker, incarnation=incarnation, model_hash="0" * 64, num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS, width=WIDTH, dtype="float32",
        )  # fmt: skip
        try:
            self._server._admit(hello)
        except HostDied:
            raise LinkDownError(f"{self.name} dies in the handshake") from None

    def serve(self, end: HostsEnd) -> None:
        assert self._server is not None
        self.ends.append(end)
        self.disturbed |= end.lossy
        end.slow_down(0.4 if self.slow else 0.0)
        self._server.attach(end)

    def pass_point(self, point: str) -> None:
        """Pass a moment of the server's work, and die if it was the last."""
        self.world.point(point, self)
        if not self.alive:
            raise HostDied

    def trouble(self) -> None:
        self.troubled_s = self.world.clock.now

    def kill(self, *, silently: bool = False) -> None:
        """Die; silently as a machine that loses power, so that nobody sees an end of file."""
        self.alive = False
        self._presence.state = State.LOST
        self.disturbed |= silently
        if not silently:
            for end in self.ends:
                end.abort()

    def stop(self) -> None:
        self.trouble()
        self.stopped = self.disturbed = True

    def go_on(self) -> None:
        self.trouble()
        self.stopped = False
        for end in self.ends:
            end.go_on()

    def slow_down(self, delay_s: float) -> None:
        self.trouble()
        self.slow = delay_s > 0
        self.disturbed |= self.slow
        for end in self.ends:
            end.slow_down(delay_s)

    def release(self) -> None:
        """Give descriptors back when the world ends."""
        if self._server is not None:
            self._server.close()
