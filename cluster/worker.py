"""What controller and workers say to each other: plain records, no Ray, no torch, no sockets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cluster.planning.placement import Pair, Placement
from llama4_dist.engine.options import EngineOptions
from llama4_dist.partition import WHOLE, Partition
from llama4_dist.telemetry.settings import DEFAULT, Telemetry


def url_host(address: str) -> str:
    """Write an IP address as the host of host:port."""
    return f"[{address}]" if ":" in address else address


class Role(StrEnum):
    """What a process of the cluster does; all but the controller are its workers.

    An attention worker leads an attention group where the model is cut; the members of the group are its stages.
    """

    EXPERT = "expert"
    ATTENTION = "attention"
    STAGE = "stage"
    CONTROLLER = "controller"


class State(StrEnum):
    """Life of a worker; LOST is the controller's word for one that does not answer, DRAINING for one about to go."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What every worker is told at birth. `num_threads` is torch's; `run_dir` holds its Unix sockets.

    `weights` is the format of linear weights (`model.weight_format`), `expert_slices` into how many slices every expert
    is cut; both are the same for all workers. `options` bound an attention worker's engine. It compares two hosts'
    answers in every `cross_check_every`-th dispatch (0 = never), and keeps requests for `resume_ttl_s` when their
    gateway is gone. `capacity_bytes` bounds the weights an expert host holds, `expert_memory_bytes` those of them it
    keeps in memory (None = no bound); there rows wait for other attention workers' rows of their layer for at most
    `pool_window_s`. `wire` is how rows travel, the same for all workers. Tests strike an `armable` one at a moment of
    their choice. `telemetry` is how it logs and traces. An attention worker of a `partition` leads a group; a member of
    it knows the `group`, which is its leader's name, and which `stage` and `rank` it is.
    """

    worker: str
    role: Role
    model_dir: Path
    dtype: str
    device: str
    num_threads: int
    run_dir: Path
    secret: bytes = field(repr=False)
    weights: str = "stored"
    expert_slices: int = 1
    options: EngineOptions = field(default_factory=EngineOptions)
    capacity_bytes: int | None = None
    expert_memory_bytes: int | None = None
    pool_window_s: float = 0.0
    wire: str = ""
    cross_check_every: int = 256
    resume_ttl_s: float = 10.0
    armable: bool = False
    telemetry: Telemetry = DEFAULT
    partition: Partition = WHOLE
    group: str = ""
    stage: int = 0
    rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the leader of a group, which computes no layer."""
        return self.role is Role.ATTENTION and self.partition != WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a worker runs: workers of one `node` share a file system; `address` is what others dial.

    Where a node of Ray is a pod, several may lie on one `machine`, and die with it; "" = the node is the machine.
    """

    node: str
    address: str
    machine: str = ""

    @property
    def dies_with(self) -> str:
        """What takes everything on it along: copies of an expert are kept apart by it."""
        return self.machine or self.node


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAddress:
    """Where an expert host listens: `unix` for its own node, `tcp` for the others."""

    host: str
    incarnation: int
    node: str
    unix: str
    tcp: str
    machine: str = ""

    @property
    def dies_with(self) -> str:
        """As `Location.dies_with`."""
        return self.machine or self.node

    def seen_from(self, node: str) -> str:
        """Return the address that a worker on `node` should dial."""
        return self.unix if node == self.node else self.tcp


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAddress:
    """Where a process of an attention group listens, and what gloo may listen on there.

    It has room for `num_pages` pages of keys; a leader says how many it counts, 0 while it counts none.
    """

    worker: str
    node: str
    address: str
    unix: str
    tcp: str
    num_pages: int

    def seen_from(self, node: str) -> str:
        """Return the address that a process on `node` should dial."""
        return self.unix if node == self.node else self.tcp


@dataclass(frozen=True, slots=True, kw_only=True)
class Formation:
    """Who is an attention group from now on: its leader, and members in the order of `Partition.places`.

    All of them have `num_pages`. `number` rises each time the group is formed.
    """

    group: str
    number: int
    num_pages: int
    leader: StageAddress
    members: tuple[StageAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """One epoch: who holds what, and where they listen. `publisher` is the incarnation of its controller."""

    epoch: int
    placement: Placement
    hosts: Mapping[str, HostAddress]
    publisher: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """An attention worker's answer to a topology: its epoch is in use, and for `switch_s` seconds no step could run."""

    epoch: int
    switch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far one worker's start is; `done` and `total` count the same unit (experts or tensors)."""

    worker: str
    role: Role
    state: State
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """A worker or the controller now. `memory_bytes` is resident memory, shared pages of the checkpoint included.

    A process of an attention group names it, and the `formation` it is in, 0 while it is in none; `last_formation` is
    the highest number it was told of. A member has `layers` from the first to before the last. `cpu_s` is the processor
    time it has taken, in user and system mode.
    """

    worker: str
    role: Role
    state: State
    incarnation: int = 0
    pid: int = 0
    node: str = ""
    addresses: tuple[str, ...] = ()
    epoch: int = 0
    experts: tuple[Pair, ...] = ()
    memory_bytes: int = 0
    group: str = ""
    stage: int = 0
    rank: int = 0
    layers: tuple[int, int] = (0, 0)
    formation: int = 0
    last_formation: int = 0
    cpu_s: float = 0.0
