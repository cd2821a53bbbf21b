"""The families of a cluster's workers and changes; translates readings, takes none."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from cluster.planning.placement import Pair
from cluster.reading import ClusterReading, HostReading, StageReading, WorkerReading
from cluster.worker import State
from llama4_dist.dispatch.units import slice_of
from llama4_dist.gateway.observe.dispatch_families import SENDER, Sender, dispatch_metrics
from llama4_dist.gateway.observe.family import Family, counter, gauge

WORKER, ROLE = "worker", "role"
UP_WITHIN_S = 6.0  # the controller asks every 0.5 s and waits 2 s for who is silent

CONTROLLER_UP = gauge("controller_up", "Whether the controller answers; without it no family of workers is shown.")
HEAD_UP = gauge("ray_head_up", "Whether the head of Ray answers; without it nothing can be changed.")
READING_AGE = gauge("cluster_reading_age_seconds", "Since the controller last answered; absent before the first time.")
EPOCH = gauge("placement_epoch", "Epoch of the placement that is published.")
REPLICAS = gauge("expert_replicas", "Live copies of the expert of the layer that has the fewest.", "layer")
ENDED = counter("scale_operations", "Changes that ended.", "kind", "result")
RUNNING = gauge("scale_operation_running", "1 for the change under way.", "kind", "phase")

UP = gauge("worker_up", "Whether the worker is ready and has answered lately.", WORKER, ROLE)
HEARTBEAT = gauge("worker_heartbeat_age_seconds", "Since the worker last answered the controller.", WORKER, ROLE)
MEMORY = gauge("worker_resident_memory_bytes", "Resident memory, shared pages included.", WORKER, ROLE)
CPU = counter("worker_cpu_seconds", "Processor time of the worker.", WORKER, ROLE)
ADOPTED_EPOCH = gauge("worker_epoch", "Epoch the attention worker uses.", WORKER)
FORMATION = gauge(
    "worker_formation", "Which formation of its attention group a process is in; 0 = none.", WORKER, "group"
)
LOST = counter("workers_lost", "Processes the controller found gone or silent.", WORKER, ROLE)

# Families of one number of an expert host.
TOKENS = counter("expert_worker_tokens", "Rows computed.", WORKER)
COMPUTE = counter("expert_worker_compute_seconds", "Time spent computing.", WORKER)
FRAMES = counter("expert_worker_frames", "Frames received.", WORKER)
POOLED = counter("expert_worker_pooled_frames", "Frames that shared a computation.", WORKER)
ADOPTED = counter("expert_worker_adoptions", "Experts taken on because no other host served them.", WORKER)
QUEUE = gauge("expert_worker_queue_depth", "Frames that wait.", WORKER)
LINKS = gauge("expert_worker_links", "Links to attention workers.", WORKER)
WEIGHTS = gauge("expert_worker_weight_bytes", "Weights held.", WORKER)
RESIDENT = gauge("expert_worker_resident_slices", "Expert slices in memory, where memory is bounded.", WORKER)
MAPPED = gauge("expert_worker_mapped_slices", "Expert slices on disk only, where memory is bounded.", WORKER)
HITS = counter("expert_worker_residency_hits", "Uses of a slice that was in memory, where memory is bounded.", WORKER)
MISSES = counter("expert_worker_residency_misses", "Uses of a slice that had to be read first.", WORKER)
REFUSALS = counter("expert_worker_refusals", "Frames refused.", WORKER, "reason")
CLOSED = counter("expert_worker_links_closed", "Links and half-open connections closed.", WORKER, "reason")

# Families of a member of an attention group.
PARTS = counter("stage_parts", "Parts of steps that a member of an attention group computed.", *SENDER)
BUSY = counter(
    "stage_busy_seconds", "Time it computed, waits for experts and for the other ranks of its stage included.", *SENDER
)
STARVED = counter("stage_starved_seconds", "Time its parts waited for rows of the stage before.", *SENDER)

BALANCE = gauge("expert_balancedness", "Mean load of a layer's hosts over that of the busiest; 1 is even.", "layer")
BALANCE_MEAN = gauge("expert_balancedness_mean", "The mean of it over layers.")
EXPERT_TOKENS = counter("expert_tokens", "Rows by expert, over all hosts; off by default.", "layer", "expert", "slice")

CLUSTER_FAMILIES = (
    CONTROLLER_UP, HEAD_UP, READING_AGE, EPOCH, REPLICAS, ENDED, RUNNING, UP, HEARTBEAT, MEMORY, CPU, ADOPTED_EPOCH,
    FORMATION, LOST, TOKENS, COMPUTE, FRAMES, POOLED, ADOPTED, QUEUE, LINKS, WEIGHTS, RESIDENT, MAPPED, HITS, MISSES,
    REFUSALS, CLOSED, PARTS, BUSY, STARVED, BALANCE, BALANCE_MEAN, EXPERT_TOKENS,
)  # fmt: skip


def cluster_metrics(reading: ClusterReading) -> Iterator[Metric]:
    """Translate what the controller says of itself and of all workers."""
    yield EPOCH.of(((), reading.epoch))
    yield REPLICAS.of(*(((str(layer),), copies) for layer, copies in reading.replicas.items()))
    yield ENDED.of(*(((kind, phase), number) for (kind, phase), number in reading.ended.items()))
    yield RUNNING.of(*([(reading.running, 1.0)] if reading.running else []))
    yield LOST.of(*(((worker, role), number) for (role, worker), number in reading.lost.items()))
    yield UP.of(*((names(one), float(is_up(one))) for one in reading.workers))
    heard = [one for one in reading.workers if one.heard_s_ago is not None]
    yield HEARTBEAT.of(*((names(one), one.heard_s_ago or 0.0) for one in heard))
    lately = [one for one in heard if is_lately(one)]  # numbers of one that is silent are no longer its own
    yield MEMORY.of(*((names(one), one.status.memory_bytes) for one in lately))
    yield CPU.of(*((names(one), one.status.cpu_s) for one in lately))
    yield ADOPTED_EPOCH.of(*(((one.status.worker,), one.status.epoch) for one in lately if one.status.epoch))
    grouped = [one.status for one in lately if one.status.group]
    yield FORMATION.of(*(((one.worker, one.group), one.formation) for one in grouped))
    yield from host_metrics({one.load.host: one for one in reading.hosts})
    yield from stage_metrics({sender_of(one): one for one in reading.stages})


def host_metrics(hosts: Mapping[str, HostReading]) -> Iterator[Metric]:
    """Translate the counters of expert hosts."""

    def each(family: Family, numbers: Mapping[str, float]) -> Metric:
        return family.of(*(((host,), number) for host, number in numbers.items()))

    yield each(TOKENS, {host: sum(one.load.rows.values()) for host, one in hosts.items()})
    yield each(COMPUTE, {host: one.load.compute_s for host, one in hosts.items()})
    yield each(FRAMES, {host: one.frames for host, one in hosts.items()})
    yield each(POOLED, {host: one.pooled_frames for host, one in hosts.items()})
    yield each(ADOPTED, {host: one.adopted for host, one in hosts.items()})
    yield each(QUEUE, {host: one.load.queue_depth for host, one in hosts.items()})
    yield each(LINKS, {host: one.links for host, one in hosts.items()})
    yield each(WEIGHTS, {host: one.load.bytes_held for host, one in hosts.items()})
    yield each(RESIDENT, {host: one.load.num_resident for host, one in hosts.items()})
    yield each(MAPPED, {host: one.load.num_mapped for host, one in hosts.items()})
    yield each(HITS, {host: one.load.residency_hits for host, one in hosts.items()})
    yield each(MISSES, {host: one.load.residency_misses for host, one in hosts.items()})
    yield REFUSALS.of(*(((host, why), num) for host, one in hosts.items() for why, num in one.refusals.items()))
    yield CLOSED.of(*(((host, why), num) for host, one in hosts.items() for why, num in one.closed_links.items()))


def stage_metrics(stages: Mapping[Sender, StageReading]) -> Iterator[Metric]:
    """Translate the counters of members of attention groups; those of their rows are as any attention worker's."""
    yield PARTS.of(*((sender, one.parts) for sender, one in stages.items()))
    yield BUSY.of(*((sender, one.busy_s) for sender, one in stages.items()))
    yield STARVED.of(*((sender, one.starved_s) for sender, one in stages.items()))
    yield from dispatch_metrics({sender: one.dispatch for sender, one in stages.items()})


def sender_of(one: StageReading) -> Sender:
    """Return the labels of a member."""
    return Sender(one.worker, one.group, str(one.stage), str(one.rank))


def balance_metrics(balance: Mapping[int, float]) -> Iterator[Metric]:
    """Translate how evenly the layers' hosts are loaded; without rows there is nothing to say."""
    yield BALANCE.of(*(((str(layer),), even) for layer, even in balance.items()))
    yield BALANCE_MEAN.of(*([((), sum(balance.values()) / len(balance))] if balance else []))


def expert_metrics(rows: Mapping[Pair, int], num_slices: int) -> Iterator[Metric]:
    """Translate rows by unit. An expert that is not cut has one slice, 0."""
    named = (((layer, *slice_of(unit, num_slices)), number) for (layer, unit), number in rows.items())
    yield EXPERT_TOKENS.of(*((tuple(map(str, labels)), number) for labels, number in named))


def names(one: WorkerReading) -> tuple[str, str]:
    """Return the labels of a worker."""
    return one.status.worker, one.status.role


def is_lately(one: WorkerReading) -> bool:
    """Tell whether a worker has answered lately."""
    return one.heard_s_ago is not None and one.heard_s_ago <= UP_WITHIN_S


def is_up(one: WorkerReading) -> bool:
    """Tell whether a worker serves."""
    return is_lately(one) and one.status.state in (State.READY, State.DRAINING)
