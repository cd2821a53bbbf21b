"""What must hold in a simulated world, after every action and at rest; it notes breaches and changes nothing."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from cluster.operation import Operation, Phase
from cluster.planning.placement import Pair
from cluster.worker import Topology
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.errors import UnavailableError
from llama4_dist.request import FinishReason, TokenOutput
from tests.simulation.links import LIMITS, WorkersEnd
from tests.simulation.tiny_model import NUM_EXPERTS, NUM_LAYERS, Content, fault_free

if TYPE_CHECKING:
    from tests.simulation.attention_process import SimAttention
    from tests.simulation.expert_process import SimHost
    from tests.simulation.world import World

PAIRS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
LONGEST_STALL_S = 0.6  # of a step while each expert has a host that answers, besides hedges


@dataclass(slots=True)
class Record:
    """What became of a request."""

    content: Content
    judged: bool  # whether its tokens have to be right
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


class Judge:
    """Watches requests, epochs, hosts that let go, links that are given up, steps that stall."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.breaches: list[str] = []
        self.records: dict[str, Record] = {}
        self.epochs: dict[str, int] = {}
        self.excused: set[str] = set()  # attention workers that could not be told of an epoch in time
        self.lit_s: dict[
            str, float
        ] = {}  # when each worker last had nothing to do, or a host that answered all through a step

    def note(self, kept: bool, breach: str) -> None:
        if not kept:
            self.breaches.append(breach)
            self._world.note(f"BREACH {breach}")

    def on_outputs(self, worker: "SimAttention", outputs: Iterable[TokenOutput]) -> None:
        """Compare what a step produced with the fault-free tokens, place by place."""
        for output in outputs:
            record = self.records[output.request_id]
            name = f"{output.request_id} on {worker.name}"
            self.note(not record.ended, f"{name}: an output after the last")
            record.tokens += output.token_ids
            tokens, reason = fault_free(record.content)
            if record.judged:
                said = tuple(record.tokens)
                self.note(said == tokens[: len(said)], f"{name}: {said}, fault-free {tokens}")
            if output.error is not None:
                record.ended = True
                self._judge_error(worker, name, output.error)
            elif output.finish_reason is not None:
                record.ended = True
                complete = len(record.tokens) == len(tokens) and output.finish_reason is reason
                cancelled = output.finish_reason is FinishReason.CANCELLED
                self.note(cancelled or complete or not record.judged, f"{name}: ends {output.finish_reason} early")

    def _judge_error(self, worker: "SimAttention", name: str, error: Exception) -> None:
        dark_s = self._world.clock.now - self.lit_s.get(worker.name, 0.0)
        plan = self._world.plan
        excuse = isinstance(error, UnavailableError) and (
            dark_s >= plan.expert_timeout_s - 0.5 or plan.capacity_bytes is not None
        )
        self.note(excuse, f"{name}: {error!r} although a host answered {dark_s:.2f} s ago")

    def on_adopted(self, worker: "SimAttention", topology: Topology) -> None:
        """An attention worker switched: to a newer epoch, which has an owner for every expert."""
        before = self.epochs.get(worker.name, 0)
        self.note(topology.epoch > before, f"{worker.name} goes from epoch {before} back to {topology.epoch}")
        self.epochs[worker.name] = topology.epoch
        self.excused.discard(worker.name)
        ownerless = [pair for pair in PAIRS if not topology.placement.hosts_of.get(pair)]
        self.note(not ownerless, f"epoch {topology.epoch} has no owner for {ownerless}")

    def on_let_go(self, host: "SimHost", pairs: Collection[Pair]) -> None:
        """A host may let go of what no attention worker sends to it, or only one that could not be told."""
        for worker in self._world.attention:
            published = worker.dispatcher.published
            if published.incarnations.get(host.name) != host.incarnation or worker.name in self.excused:
                continue
            used = [pair for pair in pairs if any(one.host == host.name for one in published.replicas[pair])]
            self.note(not used, f"{host.name} lets go of {sorted(used)}, which {worker.name} sends to it")

    def on_lost(self, worker: "SimAttention", name: str, incarnation: int, reason: str) -> None:
        """A link is given up: with cause."""
        host = self._world.host_called(name)
        if host is None or host.incarnation != incarnation or not host.alive:
            return
        causes = {"REPLY_TIMEOUT": host.disturbed, "ANSWER_WRONG": host.wrong}
        self.note(causes.get(reason, False), f"{worker.name} gives {name} up without a cause: {reason}")

    def steady_hosts(self, worker: "SimAttention") -> set[str]:
        """Hosts that answer this worker now."""
        hosts = [cast(WorkersEnd, link).host for link in worker.dispatcher.links.values()]  # these lives of theirs
        return {
            host.name
            for host in hosts
            if host.well and all(not end.lossy for end in host.ends if end.peer == worker.name)
        }

    def on_step(self, worker: "SimAttention", before: RoutingTable, steady: set[str], begun_s: float) -> None:
        """Judge a step all through which some hosts answered: it neither waits for others, nor is it held."""
        world = self._world
        steady = {name for name in steady & self.steady_hosts(worker) if world.hosts[name].troubled_s < begun_s}
        if steady:
            self.lit_s[worker.name] = world.clock.now
        stall_s = world.clock.now - begun_s
        if all(_is_on(table, steady) for table in (before, worker.dispatcher.table)):
            hedges_s = len(before.hosts - steady) * worker.dispatcher._times.hedge_after_s(LIMITS.max_rows)
            self.note(
                stall_s < LONGEST_STALL_S + hedges_s,
                f"a step of {worker.name} takes {stall_s:.2f} s, {sorted(steady)} answer",
            )
        held = worker.core.held_since_s is not None and world.plan.capacity_bytes is None
        self.note(not held or not steady, f"a step of {worker.name} is held, {sorted(steady)} answer")

    def look(self) -> None:
        """Check what must hold between any two actions."""
        for worker in self._world.attention:
            worker.core.scheduler.check()
            if not worker.core.has_work:
                self.lit_s[worker.name] = self._world.clock.now
            epoch = worker.dispatcher.published.epoch
            self.note(epoch == self.epochs.get(worker.name, 0), f"{worker.name} uses epoch {epoch} unasked")
            for host in self._world.hosts.values():
                for end in host.ends:
                    self.note(end.num_waiting <= 64, f"{end.num_waiting} frames wait at {host.name}")

    def on_operation_end(self, operation: Operation) -> None:
        """An operation ends done, cancelled or failed by something that the world did."""
        self.note(operation.phase.final, f"{operation.name} was left {operation.phase}")
        own_fault = operation.phase is Phase.FAILED and "log says why" in operation.error_message
        self.note(not own_fault, f"{operation.name} failed by a defect: {operation.error_message}")

    def disorder(self) -> list[str]:
        """Say what is not as it must be when faults have ceased and time has passed."""
        world = self._world
        found = [f"{name} goes on" for name, record in self.records.items() if not record.ended]
        controller = world.driver.controller
        if controller is None:
            return [*found, "no controller"]
        topology = controller.topology
        if controller.ledger.running or world.has_queued:
            found.append(f"{controller.ledger.running} runs")
        living = {name: host for name, host in world.hosts.items() if host.alive}
        if living.keys() != topology.hosts.keys():
            found.append(f"hosts {sorted(living)} live, the topology names {sorted(topology.hosts)}")
        wanted = min(world.plan.num_replicas, len(topology.hosts))
        few = [pair for pair in PAIRS if len(topology.placement.hosts_of.get(pair, ())) < wanted]
        if few and world.plan.capacity_bytes is None:
            found.append(f"too few copies of {few}")
        for name, host in living.items():
            table = set(topology.placement.held_by(name))
            if not table <= host.held or not host.held - table <= host.adopted:
                found.append(f"{name} holds {sorted(host.held)}, the table says {sorted(table)}")
        for worker in world.attention:
            found += self._disorder_of(worker, topology)
        return found

    def _disorder_of(self, worker: "SimAttention", topology: Topology) -> list[str]:
        world, found = self._world, []
        if worker.epoch != topology.epoch or worker.topology() != topology:
            found.append(f"{worker.name} follows epoch {worker.epoch}, not this {topology.epoch}")
        if lost := worker.dispatcher.published.hosts - worker.dispatcher.links.keys() - world.barred(worker):
            found.append(f"{worker.name} has no link to {sorted(lost)}")
        if worker.core.scheduler.allocator.num_free != world.plan.num_blocks:
            found.append(f"{worker.name} holds blocks of nobody")
        return found


def _is_on(table: RoutingTable, hosts: Collection[str]) -> bool:
    """Whether these hosts hold a copy of every expert."""
    return all(any(one.host == host for one in replicas for host in hosts) for replicas in table.replicas.values())
