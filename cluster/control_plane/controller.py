"""Decides who serves what: brings a cluster up, changes it while tokens flow, answers its operator.

Knows neither Ray nor torch: workers are spoken to through `Handle.call`; their processes belong to the driver, which
asks for orders. Nothing here is on the path of a token, and nothing is kept that the workers do not know: a controller
that dies costs the cluster its ability to change until another one has asked them.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace

from cluster.control_plane.census import read_cluster
from cluster.control_plane.change import ChangeRun
from cluster.control_plane.describe import change_of, in_order, placement_view
from cluster.control_plane.first_load import load_all
from cluster.control_plane.forming import form
from cluster.control_plane.ledger import OperationLedger
from cluster.control_plane.members import Members
from cluster.control_plane.planner import Planner
from cluster.control_plane.provisioning import Provisioning
from cluster.control_plane.takeover import strangers, take_stock
from cluster.control_plane.watch import Watch
from cluster.control_plane.wishes import Wish, likely_nodes, order, scaled, without
from cluster.handle import Handle
from cluster.operation import ChangeOptions, ClusterView, HostLoad, Kind, Operation, Phase, PlacementView
from cluster.plan import ClusterPlan, Group
from cluster.planning.autoscale import AutoscalePolicy
from cluster.planning.balance import PlacementPlan
from cluster.planning.placement import Placement
from cluster.presence import Presence
from cluster.reading import ClusterReading
from cluster.standing import CONTROLLER, Engines, Orders
from cluster.worker import Adopted, LoadProgress, Location, Role, State, Topology, WorkerStatus
from llama4_dist.errors import (
    ConfigError,
    FieldViolation,
    InvalidRequestError,
    Llama4Error,
    NotFoundError,
    PreconditionError,
)

log = logging.getLogger(__name__)

NOTHING = Topology(epoch=0, placement=Placement(hosts_of={}), hosts={})
WishOf = Callable[[Mapping[str, str]], Wish]  # of the nodes of hosts that are there
RECOVER_TIMEOUT_S = 10.0  # a worker that answers nothing for so long is not waited for


class Controller:
    """The workers of one cluster. `start` a new one or `recover` one that serves; then it may be changed."""

    def __init__(self, plan: ClusterPlan, workers: Sequence[Handle], location: Location) -> None:
        self.presence = Presence(worker=CONTROLLER, role=Role.CONTROLLER, location=location)
        self.incarnation = self.presence.incarnation
        self.members = Members(workers)
        self.provisioning = Provisioning()
        self.ledger = OperationLedger(f"{self.incarnation:x}")
        self.topology = NOTHING
        self.engines = Engines()
        self._plan = plan
        self._planner = Planner(plan)
        self._beginning = threading.Lock()
        self._progress: dict[str, LoadProgress] = {}
        self._watch = Watch(self)

    def start(self, timeout_s: float) -> Mapping[str, str]:
        """Place, load, publish epoch 1 and open the engine services within `timeout_s`; return address by worker."""
        deadline = time.monotonic() + timeout_s
        self.presence.state = State.LOADING
        experts, attention = self.members.of(Role.EXPERT), self.members.of(Role.ATTENTION)
        followers = self.members.followers
        locations = self.members.ask(experts, "location", deadline=deadline)
        nodes = {worker: location.dies_with for worker, location in locations.items()}
        try:
            plan = self.plan(Wish(staying=tuple(nodes)), nodes)
        except PreconditionError as error:
            raise ConfigError(error.message) from None
        for warning in plan.warnings:
            log.warning("placement_warning %s", warning)
        hosts = load_all(self.members, plan.placement, deadline, self._note)
        topology = Topology(epoch=1, placement=plan.placement, hosts=hosts, publisher=self.incarnation)
        self.members.ask(followers, "connect", hosts, deadline=deadline)
        self.members.ask(followers, "publish", topology, deadline=deadline)
        self.topology = topology
        for group in self._plan.groups:
            form(self.members, group, 1)
        self.engines.set(self.members.ask(attention, "serve", deadline=deadline))
        for progress in self.members.ask([*experts, *followers], "progress", deadline=deadline).values():
            self._note(progress)
        self._be_ready()
        return self.engines.all

    def recover(self) -> None:
        """Take over a cluster that serves: learn from its workers what is published, and to whom."""
        stock = take_stock(self.members, RECOVER_TIMEOUT_S, controller=self.incarnation)
        self.topology = replace(stock.topology, publisher=self.incarnation)
        _, failures = self.members.try_each(stock.behind, "publish", self.topology, timeout_s=RECOVER_TIMEOUT_S)
        # An attention worker that cannot be asked may follow what only the controller before knew.
        late = [one for one in stock.behind if one.worker in failures]
        self.dismiss([*stock.unknown, *late])
        self.engines.set({one: address for one, address in stock.engines.items() if one in self.members})
        self.end_strangers(stock.statuses)
        experts = self.members.of(Role.EXPERT)  # what a change that was cut off made them map goes
        calls = [host.call("restore", self.topology.placement.held_by(host.worker)) for host in experts]
        wait(calls, timeout=RECOVER_TIMEOUT_S)
        log.warning("controller_recovered epoch=%d hosts=%d", self.topology.epoch, len(self.topology.hosts))
        self._be_ready()

    def orders(self) -> Orders:
        """Say which processes are to start and to end, and where the engines are."""
        start, end = self.provisioning.orders()
        return Orders(start=start, end=end, engines=self.engines.all)

    def provide(self, handle: Handle) -> None:
        """Take a process that was ordered."""
        self.provisioning.provide(handle)

    def refuse(self, worker: str, error: Llama4Error) -> None:
        """Learn that a process cannot be had."""
        self.provisioning.refuse(worker, error)

    def ended(self, worker: str) -> None:
        """Learn that a process is gone."""
        self.provisioning.ended(worker)

    def progress(self) -> tuple[LoadProgress, ...]:
        """Say how far each worker was when last asked; may be called while `start` runs."""
        return tuple(self._progress.values())

    def status(self) -> tuple[WorkerStatus, ...]:
        """Describe the controller and every worker; one that does not answer is LOST."""
        return (self.presence.status(epoch=self.topology.epoch), *in_order(self.members.statuses(), self.missing))

    def view(self) -> ClusterView:
        """Describe the cluster."""
        return ClusterView(
            model=self._plan.model,
            epoch=self.topology.epoch,
            num_replicas=self._plan.num_replicas,
            workers=self.status(),
            operation=self.ledger.running,
            num_slices=self.num_slices,
        )

    def placement(self) -> PlacementView:
        """Say who holds what."""
        return placement_view(self._plan.geometry, self.topology)

    def loads(self) -> tuple[HostLoad, ...]:
        """Read every live host's counters."""
        answers, _ = self.members.try_each(self.members.of(Role.EXPERT), "load_now")
        return tuple(answers[worker] for worker in sorted(answers, key=order))

    def reading(self) -> ClusterReading:
        """Say what is measured, without waiting for a worker that is silent."""
        return read_cluster(self, self._watch)

    def scale(self, num_hosts: int, options: ChangeOptions) -> Operation:
        """Begin to bring the pool to `num_hosts`."""
        if num_hosts < 1:
            description = f"{num_hosts}; a cluster keeps at least one expert host"
            raise InvalidRequestError([FieldViolation(field="num_hosts", description=description)])

        def wish(live: Mapping[str, str]) -> Wish:
            return scaled(live, num_hosts, taken=self._known_hosts())

        return self._begin(Kind.SCALE, num_hosts, wish, options)

    def rebalance(self, options: ChangeOptions) -> Operation:
        """Begin to move experts by measured load, as far as that pays."""
        return self._begin(Kind.REBALANCE, (), lambda live: without(live, ()), options)

    def drain(self, worker: str, options: ChangeOptions) -> Operation:
        """Begin to move everything off one host and end it."""

        def wish(live: Mapping[str, str]) -> Wish:
            if worker not in self.topology.hosts:
                raise NotFoundError(
                    f"{worker!r} is no expert host here: {', '.join(sorted(self.topology.hosts, key=order))} are",
                    metadata={"resource_type": "worker", "resource_name": worker},
                )
            return without(live, [worker])

        return self._begin(Kind.DRAIN, worker, wish, options)

    def operations(self) -> tuple[Operation, ...]:
        """List operations, newest first."""
        return self.ledger.list()

    def operation(self, name: str) -> Operation:
        """Return one operation."""
        return self.ledger.get(name)

    def cancel(self, name: str) -> None:
        """Ask an operation to roll back."""
        self.ledger.cancel(name)

    def delete(self, name: str) -> None:
        """Forget an operation that has ended."""
        self.ledger.delete(name)

    def repair(self, lost: Collection[str], *, respawn: bool) -> Operation:
        """Begin to bring back what lost hosts held: on new processes of the same ids, or on those that are left."""
        joining = tuple(sorted(lost, key=order)) if respawn else ()

        def wish(live: Mapping[str, str]) -> Wish:
            return Wish(staying=without(live, lost).staying, joining=joining)

        return self._begin(Kind.REPAIR, tuple(sorted(lost)), wish, ChangeOptions())

    def plan(self, wish: Wish, nodes: Mapping[str, str], kind: Kind = Kind.SCALE) -> PlacementPlan:
        """Plan the placement on the hosts of a wish; what hosts held that are gone counts as lost."""
        current = self.topology.placement.without({*wish.joining, *self.missing_hosts}) if self.topology.epoch else None
        return self._planner.plan(wish, nodes, current=current, kind=kind)

    def pays(self, kind: Kind, plan: PlacementPlan) -> bool:
        """Say whether a plan is worth its bytes."""
        return self._planner.pays(kind, plan)

    @property
    def epoch(self) -> int:
        return self.topology.epoch

    @property
    def num_slices(self) -> int:
        return self._plan.geometry.num_slices

    @property
    def autoscale(self) -> AutoscalePolicy | None:
        return self._plan.autoscale

    @property
    def missing_hosts(self) -> tuple[str, ...]:
        """Hosts that the topology names and that are gone."""
        named = self.topology.hosts if self.topology.epoch else [one.worker for one in self._plan.experts]
        return tuple(sorted((host for host in named if host not in self.members), key=order))

    @property
    def missing_attention(self) -> Mapping[str, Role]:
        """Attention workers and members of their groups that are gone, with their roles."""
        planned = (*self._plan.attention, *self._plan.stages)
        return {one.worker: one.role for one in planned if one.worker not in self.members}

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._plan.groups

    def leads(self, worker: str) -> bool:
        """Tell whether a worker leads a group, and serves only with one."""
        return any(group.leader == worker for group in self._plan.groups)

    @property
    def missing(self) -> list[tuple[Role, str]]:
        """Workers that there should be and that have no process."""
        hosts = [(Role.EXPERT, host) for host in self.missing_hosts]
        return [*hosts, *((role, worker) for worker, role in self.missing_attention.items())]

    @property
    def is_complete(self) -> bool:
        """Whether the topology names a host for every expert."""
        hosts_of = self.topology.placement.hosts_of
        return all(hosts_of.get(pair) for pair in self._plan.geometry.pairs)

    def dismiss(self, handles: Collection[Handle]) -> None:
        """Take these very processes off the books and order the end of what is left of them."""
        for worker in (dropped := self.members.drop(handles)):
            log.warning("worker_dismissed worker=%s", worker)
            self.engines.remove(worker)
        self.provisioning.dismiss(dropped, timeout_s=0.0)

    def end_strangers(self, statuses: Mapping[str, WorkerStatus]) -> None:
        """End expert hosts that answered and that the topology does not name; only while no change brings any up."""
        self.dismiss(self.members.named(strangers(self.topology, statuses)))

    def publish(self, topology: Topology, timeout_s: float) -> Mapping[str, Adopted]:
        """Let every follower switch; return the answers of those that did in time."""
        self.topology = topology  # whoever comes now gets this one
        adopted, failures = self.members.try_each(self.members.followers, "publish", topology, timeout_s=timeout_s)
        for worker, error in failures.items():
            log.warning("topology_not_adopted worker=%s epoch=%d cause=%s", worker, topology.epoch, error)
        return adopted

    def _begin(self, kind: Kind, asked: Hashable, wish_of: WishOf, options: ChangeOptions) -> Operation:
        """Plan a change and let it run in a thread of its own."""
        with self._beginning:
            if (before := self.ledger.repeated(kind, asked, options.request_id)) is not None:
                return before
            self._check_ready()
            self.ledger.check_free()
            self.note_loads()
            live = self._live_nodes()
            wish = wish_of(live)
            plan = self.plan(wish, likely_nodes(live, wish.joining), kind)
            change = change_of(wish, self.topology, plan)
            if options.validate_only:
                return Operation(name="", kind=kind, phase=Phase.DONE, change=change, warnings=plan.warnings)
            operation = self.ledger.begin(kind, asked, options)
            operation = self.ledger.update(operation.name, change=change)
        run = ChangeRun(self, operation.name, kind, wish, options)
        threading.Thread(target=run.run, name=operation.name, daemon=True).start()
        return operation

    def note_loads(self) -> None:
        """Read every live host's counters for the plans to come."""
        self._planner.note(self.loads())

    def _check_ready(self) -> None:
        if self.presence.state is not State.READY:
            raise PreconditionError(f"the cluster is {self.presence.state}: wait until it is ready", reason="NOT_READY")

    def _be_ready(self) -> None:
        self.presence.state = State.READY
        self._watch.start()

    def _live_nodes(self) -> dict[str, str]:
        """Return what every host that is there dies with."""
        return {host: address.dies_with for host, address in self.topology.hosts.items() if host in self.members}

    def _known_hosts(self) -> set[str]:
        """Return the ids that may still have a process, though the topology names it no more."""
        return {handle.worker for handle in self.members.of(Role.EXPERT)} | self.topology.hosts.keys()

    def _note(self, progress: LoadProgress) -> None:
        self._progress[progress.worker] = progress
