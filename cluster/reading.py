"""What a cluster tells whoever measures it: counters and states of one moment. Plain records, and how to fill them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.operation import HostLoad, Kind, Phase
from cluster.placement import Pair
from cluster.worker import Role, State, WorkerStatus

if TYPE_CHECKING:
    from cluster.controller import Controller
    from cluster.watch import Watch

ANSWER_TIMEOUT_S = 2.0  # of an expert host, for its counters


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


def read_cluster(controller: "Controller", watch: "Watch") -> ClusterReading:
    """Read what the controller knows, and ask the expert hosts for their counters; who is late is left out."""
    experts = controller.members.of(Role.EXPERT)
    answers, _ = controller.members.try_each(experts, "reading", timeout_s=ANSWER_TIMEOUT_S)
    topology = controller.topology
    return ClusterReading(
        epoch=topology.epoch,
        workers=(*watch.readings(), *map(gone, controller.missing)),
        hosts=tuple(answers[worker] for worker in sorted(answers)),
        replicas=fewest_copies(topology.placement.hosts_of, {host.worker for host in experts}),
        ended=dict(controller.ledger.num_ended),
        running=controller.ledger.under_way,
        num_slices=controller.num_slices,
        lost=dict(watch.lost),
    )


def gone(worker: tuple[Role, str]) -> WorkerReading:
    """Describe a worker that there should be and that has no process."""
    return WorkerReading(status=WorkerStatus(worker=worker[1], role=worker[0], state=State.LOST))


def fewest_copies(hosts_of: Mapping[Pair, Collection[str]], live: Collection[str]) -> dict[int, int]:
    """Return for each layer how many live hosts hold the expert that the fewest hold."""
    fewest: dict[int, int] = {}
    for (layer, _), hosts in hosts_of.items():
        copies = len(set(hosts).intersection(live))
        fewest[layer] = min(fewest.get(layer, copies), copies)
    return fewest
