"""Carries one change of the expert hosts out, from its plan to the memory that is free again; undoes it if it fails.

Until the new epoch is published nothing that serves is touched: hosts only map more. After it every attention worker
has switched between two of its steps, so nothing is in flight to the old places, and they let go.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait
from typing import Any, Protocol

from cluster.control_plane.describe import change_of
from cluster.control_plane.following import WorkerLostError, follow
from cluster.control_plane.ledger import OperationLedger
from cluster.control_plane.members import Members
from cluster.control_plane.proofs import compare, to_prove
from cluster.control_plane.provisioning import Provisioning
from cluster.control_plane.wishes import Wish
from cluster.handle import Handle
from cluster.operation import ChangeOptions, Kind, Phase
from cluster.planning.balance import PlacementPlan
from cluster.planning.placement import Pair
from cluster.worker import Adopted, HostAddress, Role, Topology
from llama4_dist.errors import EngineError, Llama4Error

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # for a process to be there; a new node may have to come first
LOAD_TIMEOUT_S = 3600.0
COMMIT_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0


class Site(Protocol):
    """What a change works on; the controller is one."""

    incarnation: int
    members: Members
    ledger: OperationLedger
    provisioning: Provisioning
    topology: Topology

    def plan(self, wish: Wish, nodes: Mapping[str, str], kind: Kind) -> PlacementPlan: ...
    def pays(self, kind: Kind, plan: PlacementPlan) -> bool: ...
    def publish(self, topology: Topology, timeout_s: float) -> Mapping[str, Adopted]: ...


class ChangeRun:
    """One operation while it runs. `run` ends it in the ledger, whatever happens."""

    def __init__(self, site: Site, name: str, kind: Kind, wish: Wish, options: ChangeOptions) -> None:
        self._site = site
        self._name = name
        self._kind = kind
        self._wish = wish
        self._options = options
        self._lost: set[str] = set()  # hosts that died meanwhile and are not needed for the change
        self._bytes_done = 0
        self._moves_done = 0
        self._addresses: dict[str, HostAddress] = {}  # of new hosts that have loaded
        self._told: list[Handle] = []  # attention workers that were told whom to dial

    def run(self) -> None:
        """Carry the change out."""
        failure: Llama4Error | None = None
        try:
            self._carry_out()
        except Exception as error:  # noqa: BLE001 - told to the operator, for whom every operation has to end
            failure = _public(error)
        self._site.ledger.end(self._name, failure)

    def _carry_out(self) -> None:
        try:
            prepared = self._prepare()
        except Exception as error:
            log.warning("operation_rolled_back name=%s", self._name, exc_info=not isinstance(error, Llama4Error))
            self._site.ledger.update(self._name, phase=Phase.ROLLING_BACK)
            self._roll_back()
            raise
        if prepared is None:
            return
        try:
            self._commit(prepared)
            self._free(prepared)
        except Exception:  # what is published serves; the repair that follows sees to the rest
            log.exception("operation_failed name=%s", self._name)
            raise

    def _prepare(self) -> Topology | None:
        """Do all that can be undone; return what is to be published, None if it is not worth its price."""
        self._enter(Phase.PROVISIONING)
        nodes = self._start_hosts()
        while True:
            try:
                return self._prepare_on(nodes)
            except WorkerLostError as error:
                if not self._can_spare(error.worker, nodes):
                    raise
                self._lost.add(error.worker)
                nodes = {host: node for host, node in nodes.items() if host != error.worker}
                self._site.ledger.warn(self._name, f"{error.worker} died meanwhile: planned again without it")

    def _prepare_on(self, nodes: Mapping[str, str]) -> Topology | None:
        """Plan on these hosts, load, verify and dial."""
        wish = self._wish.sparing(self._lost)
        plan = self._site.plan(wish, nodes, self._kind)
        self._site.ledger.update(self._name, change=change_of(self._wish, self._site.topology, plan))
        for warning in plan.warnings:
            self._site.ledger.warn(self._name, warning)
        if not self._site.pays(self._kind, plan):
            self._site.ledger.warn(
                self._name, f"nothing was moved: {plan.num_bytes} bytes would not pay for themselves"
            )
            return None
        self._enter(Phase.LOADING)
        self._addresses |= self._load(plan)
        self._enter(Phase.VERIFYING)
        self._verify(plan)
        self._connect()
        self._enter(Phase.COMMITTING)
        known = {**self._site.topology.hosts, **self._addresses}
        return Topology(
            epoch=self._site.topology.epoch + 1,
            publisher=self._site.incarnation,
            placement=plan.placement,
            # A host that died meanwhile stays on the list, without an expert: its replacement is the repair's.
            hosts={host: known[host] for host in self._wish.hosts if host in known},
        )

    def _can_spare(self, worker: str, nodes: Mapping[str, str]) -> bool:
        """Tell whether the change may go on without a host that died: not without one an operator asked for."""
        return worker in nodes and len(nodes) > 1 and (self._kind is Kind.REPAIR or worker not in self._wish.joining)

    def _connect(self) -> None:
        """Let attention workers dial the new hosts, and then whom else they do not know; those gone are spared."""
        known = {**self._site.topology.hosts, **self._addresses}
        wish = self._wish.sparing(self._lost)
        attention = self._told = self._site.members.followers
        new = {host: known[host] for host in wish.joining}
        calls = {worker: worker.call("connect", new) for worker in attention}
        answers = self._follow(calls, "connect", timeout_s=COMMIT_TIMEOUT_S, spared=self._note_death)
        others = {host: known[host] for host in wish.staying}
        # A host that died this moment is no reason to stop: attention workers do without it already.
        wait([one.call("connect", others) for one in attention if one.worker in answers], timeout=COMMIT_TIMEOUT_S)

    def _note_death(self, worker: str) -> None:
        self._site.ledger.warn(self._name, f"{worker} died meanwhile")

    def _start_hosts(self) -> dict[str, str]:
        """Have new hosts started; return what every host there will be dies with."""
        wish = self._wish
        nodes = {host: self._site.topology.hosts[host].dies_with for host in wish.staying}
        if wish.joining:
            handles = self._site.provisioning.obtain(
                wish.joining, Role.EXPERT, timeout_s=START_TIMEOUT_S, check=self._check_cancelled
            )
            self._site.members.add(handles)
            calls = {handle: handle.call("location") for handle in handles}
            locations = self._follow(calls, "say where it runs", timeout_s=START_TIMEOUT_S)
            nodes |= {worker: location.dies_with for worker, location in locations.items()}
            self._site.ledger.update(self._name, hosts_ready=len(handles))
        return nodes

    def _load(self, plan: PlacementPlan) -> dict[str, HostAddress]:
        """Let every host map what it will hold besides what it holds; return where the new ones listen."""
        gains: dict[str, list[Pair]] = defaultdict(list)
        for move in plan.moves:
            gains[move.target].append(move.pair)
        num_by_host = Counter(move.target for move in plan.moves)
        expert_bytes = plan.num_bytes // max(1, len(plan.moves))

        def note(worker: str) -> None:
            self._moves_done += num_by_host[worker]
            self._bytes_done += num_by_host[worker] * expert_bytes
            self._site.ledger.update(self._name, moves_done=self._moves_done, bytes_done=self._bytes_done)

        new = {host for host in self._wish.joining if host not in self._addresses and host not in self._lost}
        calls = {
            host: host.call("load" if host.worker in new else "add", sorted(gains[host.worker]))
            for host in self._hosts({*new, *num_by_host})
        }
        answers = self._follow(calls, "load", timeout_s=LOAD_TIMEOUT_S, done=note)
        return {host: answers[host] for host in new}

    def _verify(self, plan: PlacementPlan) -> None:
        """Compare weights and answers to golden rows, layer by layer, with a host that serves the same experts."""
        wanted = to_prove(plan.moves)
        targets = self._hosts({move.target for move in plan.moves})
        sources = [host for host in self._site.members.named(wanted) if host not in targets]
        calls = {host: host.call("fingerprints", sorted(wanted[host.worker])) for host in (*targets, *sources)}
        proofs = {host: calls[host] for host in targets}
        prints = self._follow(proofs, "answer golden rows", timeout_s=LOAD_TIMEOUT_S)
        wait([calls[host] for host in sources], timeout=COMMIT_TIMEOUT_S)
        for host in sources:  # one that dies meanwhile proves nothing, and is no reason to stop
            if calls[host].done() and calls[host].exception() is None:
                prints[host.worker] = calls[host].result()
        if num_unverified := compare(plan.moves, prints):
            self._site.ledger.warn(self._name, f"{num_unverified} copies had no live replica to be compared with")

    def _commit(self, topology: Topology) -> None:
        """Publish the next epoch; each attention worker switches between two of its steps."""
        # One that was replaced since then would dial while its step waits.
        came = [one for one in self._site.members.followers if not any(one is told for told in self._told)]
        wait([one.call("connect", topology.hosts) for one in came], timeout=COMMIT_TIMEOUT_S)
        self._site.ledger.update(self._name, epoch=topology.epoch)
        adopted = self._site.publish(topology, self._options.drain_timeout_s)
        self._site.ledger.update(self._name, paused_s=max((one.switch_s for one in adopted.values()), default=0.0))
        for handle in self._site.members.followers:
            if handle.worker not in adopted:
                self._site.ledger.warn(self._name, f"{handle.worker} has not switched to epoch {topology.epoch} yet")

    def _free(self, topology: Topology) -> None:
        """Let hosts that stay keep what the new epoch gives them, and end those that leave."""
        self._enter(Phase.DRAINING)
        calls = {
            host.call("keep", topology.placement.held_by(host.worker)): host.worker
            for host in self._site.members.named(self._wish.hosts)
        }
        done, _ = wait(calls, timeout=self._options.drain_timeout_s)
        if greedy := sorted(worker for call, worker in calls.items() if call not in done or call.exception()):
            self._site.ledger.warn(self._name, f"{', '.join(greedy)} did not let go of what is elsewhere now")
        self._end(self._wish.leaving)

    def _roll_back(self) -> None:
        """Undo what was prepared: hosts that serve hold what they held, new ones go."""
        placement = self._site.topology.placement
        staying = self._site.members.named(self._wish.staying)
        calls = [host.call("restore", placement.held_by(host.worker)) for host in staying]
        wait(calls, timeout=END_TIMEOUT_S)
        self._end(self._wish.joining)

    def _end(self, workers: Collection[str]) -> None:
        if not workers:
            return
        members = self._site.members
        wait([handle.call("close") for handle in members.named(workers)], timeout=END_TIMEOUT_S)
        members.remove(workers)
        if late := self._site.provisioning.dismiss(workers, timeout_s=END_TIMEOUT_S):
            self._site.ledger.warn(self._name, f"{', '.join(late)} did not end in {END_TIMEOUT_S:.0f} s")

    def _hosts(self, hosts: Collection[str]) -> list[Handle]:
        """Return the processes of hosts that are needed; UnavailableError (WORKER_LOST) if one is gone."""
        handles = self._site.members.named(hosts)
        if gone := sorted(set(hosts) - {handle.worker for handle in handles}):
            raise WorkerLostError(gone[0], f"{', '.join(gone)} died while {self._name} ran")
        return handles

    def _follow(
        self, calls: Mapping[Handle, Future[Any]], doing: str, *, timeout_s: float, **told: Any
    ) -> dict[str, Any]:
        return follow(calls, doing, timeout_s=timeout_s, check=self._check_cancelled, **told)

    def _enter(self, phase: Phase) -> None:
        self._site.ledger.enter(self._name, phase)
        log.info("operation_phase name=%s phase=%s", self._name, phase)

    def _check_cancelled(self) -> None:
        self._site.ledger.check_cancelled(self._name)


def _public(error: Exception) -> Llama4Error:
    return (
        error
        if isinstance(error, Llama4Error)
        else EngineError(f"{type(error).__name__}: the controller's log says why")
    )
