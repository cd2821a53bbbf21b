"""Reads counters and states of all workers at one moment, for whoever measures the cluster."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cluster.handle import Handle
from cluster.planning.placement import Pair
from cluster.reading import ClusterReading, WorkerReading
from cluster.worker import Role, State, WorkerStatus

if TYPE_CHECKING:
    from cluster.control_plane.controller import Controller
    from cluster.control_plane.watch import Watch

ANSWER_TIMEOUT_S = 2.0  # of a worker, for its counters


def read_cluster(controller: "Controller", watch: "Watch") -> ClusterReading:
    """Read what the controller knows, and ask the workers for their counters; who is late is left out.

    Attention workers and leaders of groups tell theirs with their engines.
    """
    experts, stages = controller.members.of(Role.EXPERT), controller.members.of(Role.STAGE)
    answers, _ = controller.members.try_each([*experts, *stages], "reading", timeout_s=ANSWER_TIMEOUT_S)
    topology = controller.topology
    return ClusterReading(
        epoch=topology.epoch,
        workers=(*watch.readings(), *map(gone, controller.missing)),
        hosts=answered(experts, answers),
        stages=answered(stages, answers),
        replicas=fewest_copies(topology.placement.hosts_of, {host.worker for host in experts}),
        ended=dict(controller.ledger.num_ended),
        running=controller.ledger.under_way,
        num_slices=controller.num_slices,
        lost=dict(watch.lost),
    )


def answered(workers: Iterable[Handle], answers: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what these workers said, by their names."""
    return tuple(answers[worker] for worker in sorted(one.worker for one in workers) if worker in answers)


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
