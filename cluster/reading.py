"""What a cluster tells whoever measures it: counters and states of one moment. Plain records."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.operation import HostLoad, Kind, Phase
from cluster.worker import Role, WorkerStatus
from llama4_dist.dispatch.stats import DispatchCounters


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReading:
    """One expert host's counters since it began; `refusals` and `closed_links` are by reason."""

    load: HostLoad
    frames: int = 0
    pooled_frames: int = 0
    links: int = 0
    adopted: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    closed_links: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReading:
    """One member of an attention group: its counters since its process began, however often the group was formed.

    Of `parts` of steps it computed; `busy_s` is the time it took for them once their rows were there, waits for experts
    and for the other ranks of its stage included; `starved_s` the time parts waited here for rows of the stage before.
    """

    worker: str
    group: str
    stage: int
    rank: int
    dispatch: DispatchCounters
    parts: int = 0
    busy_s: float = 0.0
    starved_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReading:
    """What a worker last said of itself, and how long ago; None where it has never answered or is gone."""

    status: WorkerStatus
    heard_s_ago: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterReading:
    """The cluster now; counters are those of the present controller, and begin anew with the next.

    `replicas` is by layer the number of live copies of the expert with the fewest; `ended` counts operations by kind
    and how they ended; `lost` counts the processes that were found gone.
    """

    epoch: int
    workers: tuple[WorkerReading, ...]
    hosts: tuple[HostReading, ...]
    replicas: Mapping[int, int]
    ended: Mapping[tuple[Kind, Phase], int]
    running: tuple[Kind, Phase] | None = None
    num_slices: int = 1  # of every expert; `HostLoad.rows` counts units
    lost: Mapping[tuple[Role, str], int] = field(default_factory=dict)
    stages: tuple[StageReading, ...] = ()
