"""Workers that are plain objects: they keep the rules of real ones and note every breach of the contract among them."""

import itertools
import time
from collections.abc import Sequence
from typing import Protocol

from cluster.operation import HostLoad
from cluster.planning.placement import ExpertGeometry, Pair
from cluster.reading import HostReading, StageReading
from cluster.worker import (
    Adopted,
    Formation,
    HostAddress,
    LoadProgress,
    Location,
    Role,
    StageAddress,
    State,
    Topology,
    WorkerConfig,
    WorkerStatus,
)
from llama4_dist.dispatch.stats import DispatchCounters
from llama4_dist.errors import LinkDownError, PreconditionError, UnavailableError

GEOMETRY = ExpertGeometry(moe_layers=(0, 1), num_experts=4, expert_width=8, expert_bytes=10)
SWITCH_S = 0.002

incarnations = itertools.count(1)


class World(Protocol):
    """What a worker sees of the others."""

    workers: "dict[str, FakeWorker]"
    dead: set[str]

    @property
    def newest_epoch(self) -> int: ...
    def node_of(self, worker: str) -> str: ...
    def machine_of(self, worker: str) -> str: ...
    def hosts(self) -> "dict[str, FakeHost]": ...
    def serving(self) -> "list[FakeAttention]": ...
    def note(self, kept: bool, breach: str) -> None: ...


class FakeWorker:
    """What every worker can do."""

    def __init__(self, config: WorkerConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.incarnation = next(incarnations)
        self.loaded = False

    @property
    def name(self) -> str:
        return self.config.worker

    def location(self) -> Location:
        machine = self.world.machine_of(self.name)
        return Location(node=self.world.node_of(self.name), address="127.0.0.1", machine=machine)

    def progress(self) -> LoadProgress:
        state = State.READY if self.loaded else State.LOADING
        return LoadProgress(worker=self.name, role=self.config.role, state=state, done=1 + self.loaded, total=2)

    def close(self) -> None:
        pass


class FakeHost(FakeWorker):
    """An expert host. Its weights are names; `poison` makes it fingerprint wrongly."""

    def __init__(self, config: WorkerConfig, world: World) -> None:
        super().__init__(config, world)
        self.held: set[Pair] = set()
        self.adopted: set[Pair] = set()
        self.proven: set[Pair] = set()
        self.poison = ""
        self.rows: dict[Pair, int] = {}

    def address(self) -> HostAddress | None:
        if not self.loaded:
            return None
        node = self.world.node_of(self.name)
        return HostAddress(
            host=self.name,
            incarnation=self.incarnation,
            node=node,
            unix="unix:/x",
            tcp="tcp:x:1",
            machine=self.world.machine_of(self.name),
        )

    def load(self, pairs: Sequence[Pair]) -> HostAddress | None:
        self.held |= set(pairs)
        self.loaded = True
        return self.address()

    def add(self, pairs: Sequence[Pair]) -> None:
        self.held |= set(pairs)

    def fingerprints(self, pairs: Sequence[Pair]) -> dict[Pair, str]:
        self.proven |= set(pairs) & self.held
        return {pair: f"{pair}{self.poison}" for pair in pairs if pair in self.held}

    def keep(self, pairs: Sequence[Pair]) -> int:
        return self._let_go(self.held - set(pairs))

    def restore(self, pairs: Sequence[Pair]) -> int:
        return self._let_go(self.held - set(pairs) - self.adopted)

    def load_now(self) -> HostLoad:
        return HostLoad(host=self.name, incarnation=self.incarnation, at_s=time.monotonic(), rows=dict(self.rows))

    def reading(self) -> HostReading:
        return HostReading(load=self.load_now(), adopted=len(self.adopted))

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            worker=self.name,
            role=Role.EXPERT,
            state=State.READY if self.loaded else State.NEW,
            incarnation=self.incarnation,
            experts=tuple(sorted(self.held)),
        )

    def close(self) -> None:
        self._let_go(set(self.held))

    def _let_go(self, pairs: set[Pair]) -> int:
        for worker in self.world.serving():
            topology = worker.topology_in_use
            assert topology is not None
            address = topology.hosts.get(self.name)
            if address is not None and address.incarnation == self.incarnation:
                used = pairs & set(topology.placement.held_by(self.name))
                self.world.note(not used, f"{self.name} lets go of {sorted(used)}, which {worker.name} sends to it")
        self.held -= pairs
        self.adopted -= pairs
        return len(pairs) * GEOMETRY.expert_bytes


class FakeAttention(FakeWorker):
    """An attention worker; a topology has to be complete, proven and connected when it comes."""

    def __init__(self, config: WorkerConfig, world: World) -> None:
        super().__init__(config, world)
        self.rows_sent = 0
        self.prepared = 0
        self.formation: Formation | None = None
        self.topology_in_use: Topology | None = None
        self.served = False
        self.epochs: list[int] = []
        self.claimed_by = 0
        self.connected: set[tuple[str, int]] = set()

    @property
    def where(self) -> str:
        return f"address of {self.name} {self.incarnation}"

    def load(self) -> None:
        self.loaded = True

    def connect(self, hosts: dict[str, HostAddress]) -> None:
        for name, address in hosts.items():
            if (name, address.incarnation) in self.connected:
                continue
            host = self.world.workers.get(name)
            if host is None or host.incarnation != address.incarnation or name in self.world.dead:
                raise LinkDownError(f"{name} does not answer")
            self.connected.add((name, address.incarnation))

    def publish(self, topology: Topology) -> Adopted:
        if topology.publisher < self.claimed_by:
            raise PreconditionError("of a controller that was replaced", reason="STALE_CONTROLLER")
        if topology.epoch <= (self.epochs[-1] if self.epochs else 0):
            raise PreconditionError("not newer", reason="STALE_EPOCH")
        self._check_ready(topology)
        self.epochs.append(topology.epoch)
        self.topology_in_use = topology
        return Adopted(epoch=topology.epoch, switch_s=SWITCH_S)

    def prepare(self, number: int) -> StageAddress:
        if number <= self.prepared:
            raise PreconditionError("not newer", reason="STALE_FORMATION")
        self.prepared, self.formation = number, None
        return StageAddress(
            worker=self.name, node=self.world.node_of(self.name), address="x", unix=self.where, tcp="", num_pages=9
        )

    def form(self, formation: Formation) -> None:
        if formation.number != self.prepared:
            raise PreconditionError("not prepared", reason="STALE_FORMATION")
        present = {
            one.where
            for name, one in self.world.workers.items()
            if isinstance(one, FakeAttention) and name not in self.world.dead
        }
        if not present >= {one.unix for one in (formation.leader, *formation.members)}:
            raise UnavailableError("somebody does not answer", reason="WORKER_LOST")
        self.formation = formation

    def serve(self) -> str:
        self.world.note(not self.config.leads or self.formation is not None, f"{self.name} serves without a group")
        known = self.epochs[-1] if self.epochs else 0
        newest = self.world.newest_epoch
        self.world.note(known >= max(1, newest), f"{self.name} begins to serve with epoch {known} of {newest}")
        self.served = True
        return self.where

    def reading(self) -> StageReading:
        config = self.config
        counters = DispatchCounters(host_transports={"expert-0": "unix"}, host_rows={"expert-0": self.rows_sent})
        return StageReading(
            worker=self.name, group=config.group, stage=config.stage, rank=config.rank, dispatch=counters
        )

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            worker=self.name,
            role=self.config.role,
            state=State.READY if self.served else State.LOADING,
            incarnation=self.incarnation,
            addresses=(self.where,) if self.served or (self.config.group and self.loaded) else (),
            epoch=self.epochs[-1] if self.epochs else 0,
            group=self.config.group or (self.name if self.config.leads else ""),
            formation=self.number,
            last_formation=self.prepared,
        )

    @property
    def number(self) -> int:
        """The formation it is in; one that lost a process is of no use."""
        if self.formation is None:
            return 0
        live = {
            one.where
            for name, one in self.world.workers.items()
            if isinstance(one, FakeAttention) and name not in self.world.dead and one.formation == self.formation
        }
        everybody = {one.unix for one in (self.formation.leader, *self.formation.members)}
        return self.formation.number if live == everybody else 0

    def close(self) -> None:
        self.topology_in_use = None

    def call_topology(self, controller: int = 0) -> Topology | None:
        self.claimed_by = max(self.claimed_by, controller)
        return self.topology_in_use

    def _check_ready(self, topology: Topology) -> None:
        """Note what a topology promises and hosts do not hold, or have not proven, or this worker did not dial."""
        if not self.served and topology.epoch < self.world.newest_epoch:
            return  # it is told the newest one before it serves
        for name, address in topology.hosts.items():
            host = self.world.hosts().get(name)
            if host is None or host.incarnation != address.incarnation:
                continue  # it died meanwhile
            missing = set(topology.placement.held_by(name)) - host.held
            self.world.note(
                not missing, f"epoch {topology.epoch} gives {name} {sorted(missing)}, which it does not hold"
            )
            before = set(self.topology_in_use.placement.held_by(name)) if self.topology_in_use else set()
            if not self.served:
                continue
            unproven = set(topology.placement.held_by(name)) - before - host.proven
            self.world.note(
                not unproven, f"epoch {topology.epoch} gives {name} {sorted(unproven)}, which nobody compared"
            )
            self.world.note(
                (name, address.incarnation) in self.connected,
                f"{self.name} has not dialled {name} before the epoch",
            )
