"""An attention worker: the engine of one model copy, links to every expert host, and the gRPC service; no Ray."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TypeVar

import psutil

from cluster.host_links import HostLinks
from cluster.placement import routing_table
from cluster.referee import Referee
from cluster.worker import (
    Adopted,
    HostAddress,
    LoadProgress,
    Location,
    Role,
    State,
    Topology,
    WorkerConfig,
    WorkerStatus,
    url_host,
)
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.handshake import Hello
from llama4_dist.dispatch.handshake import Role as LinkRole
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import Link, LinkLimits, dtype_name
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.engine.build import build_engine, resolve_dtype
from llama4_dist.engine.devices import arithmetic, rows_device
from llama4_dist.engine.local import LocalEngine
from llama4_dist.errors import PreconditionError
from llama4_dist.native import threads
from llama4_dist.rpc.engine_service import EngineServer

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0


class AttentionWorker:
    """One worker: `load`, `connect` and `publish` a topology, `serve`; more are published while it serves."""

    def __init__(self, config: WorkerConfig, location: Location) -> None:
        self._config = config
        self._location = location
        self.incarnation = time.time_ns() // 1_000_000
        self._state = State.NEW
        self._loaded = (0, 0)
        self._epoch = 0
        self._topology: Topology | None = None
        self._controller = 0  # the youngest that has spoken
        self._service: EngineServer | None = None
        self._starting = threading.Lock()
        self._publishing = threading.Lock()
        self._resources = ExitStack()

    def location(self) -> Location:
        """Say where this worker runs."""
        return self._location

    def load(self) -> None:
        """Open the checkpoint and build the engine, without any expert host yet."""
        config = self._config
        self._state = State.LOADING
        threads.set_count(config.num_threads)
        checkpoint = self._checkpoint = Checkpoint.open(config.model_dir)
        self._resources.callback(checkpoint.close)
        self._dtype = resolve_dtype(config.dtype, checkpoint.config.dtype)
        self._dispatcher = Dispatcher(
            worker=config.worker,
            incarnation=self.incarnation,
            table=RoutingTable(epoch=0, replicas={}),
            links={},
            width=checkpoint.config.hidden_size,
            dtype=self._dtype,
            device=rows_device(self._dtype, config.device),
            checks=CrossCheck(
                every=config.cross_check_every,
                referee=Referee(
                    checkpoint,
                    dtype=self._dtype,
                    device=config.device,
                    weights=config.weights,
                    num_slices=config.expert_slices,
                    wire=config.wire,
                ),
            ),
            on_lost=lambda *loss: self._links.lost(*loss),
        )
        self._links = HostLinks(self._dial, self._restore)
        self._resources.callback(self._dispatcher.close)
        self._engine: LocalEngine = build_engine(
            checkpoint,
            self._dispatcher,
            options=config.options,
            dtype=self._dtype,
            device=config.device,
            weights=config.weights,
            progress=self._report,
        )
        self._resources.callback(self._engine.close)
        self._resources.callback(self._links.close)

    def serve(self) -> str:
        """Start the engine and its service; return the service's address."""
        with self._starting:
            service = EngineServer(
                self._engine,
                host=url_host(self._location.address),
                secret=self._config.secret,
                resume_ttl_s=self._config.resume_ttl_s,
            )
            self._service = service
        self._resources.callback(service.close)
        self._state = State.READY
        return service.address

    def connect(self, hosts: Mapping[str, HostAddress]) -> None:
        """Dial hosts that a topology to come will name; raises HandshakeError or LinkDownError where one refuses."""
        self._links.connect(hosts, self._dispatcher.links)

    def publish(self, topology: Topology) -> Adopted:
        """Switch to a topology between two steps; when this returns nothing is in flight to the old places.

        A host that cannot be reached counts as lost, and is dialled again. Raises PreconditionError for an epoch that
        is not newer, and for one of a controller that another has taken over from: whoever publishes it has missed
        something.
        """
        with self._publishing:
            if topology.publisher < self._controller:
                raise PreconditionError(
                    f"epoch {topology.epoch} is of a controller that was replaced", reason="STALE_CONTROLLER"
                )
            if topology.epoch <= self._epoch:
                raise PreconditionError(
                    f"epoch {topology.epoch} is not newer than {self._epoch}, which is in use here",
                    reason="STALE_EPOCH",
                )
            incarnations = {host: address.incarnation for host, address in topology.hosts.items()}
            table = routing_table(
                topology.placement,
                epoch=topology.epoch,
                incarnations=incarnations,
                num_slices=self._config.expert_slices,
            )
            in_use = dict(self._dispatcher.links)
            taken = self._links.take(topology.hosts, in_use)

            def switch() -> float:
                begun_s = time.perf_counter()
                links = usable(taken, in_use, self._dispatcher.links, incarnations)
                self._dispatcher.switch(table, links)
                for host, link in taken.items():
                    if links.get(host) is not link:
                        link.abort()
                for host in incarnations.keys() - links.keys():
                    self._links.lost(host, incarnations[host], "NOT_REACHED")
                return time.perf_counter() - begun_s

            switch_s = self._between_steps(switch)
            self._topology, self._epoch = topology, topology.epoch
            self._controller = topology.publisher
        log.info("topology_adopted worker=%s epoch=%d hosts=%d", self._config.worker, self._epoch, len(taken))
        return Adopted(epoch=topology.epoch, switch_s=switch_s)

    def topology(self, controller: int = 0) -> Topology | None:
        """Return what this worker was told last, for a controller that has to begin anew.

        From now on it takes nothing of an older controller, whose last word may still be on its way.
        """
        with self._publishing:
            self._controller = max(self._controller, controller)
            return self._topology

    def progress(self) -> LoadProgress:
        """Say how many tensors are loaded."""
        done, total = self._loaded
        return LoadProgress(worker=self._config.worker, role=Role.ATTENTION, state=self._state, done=done, total=total)

    def queue_age_s(self) -> float:
        """Say how long the oldest request has waited to be admitted."""
        return self._engine.stats().max_queue_age_s

    def status(self) -> WorkerStatus:
        """Describe this worker."""
        return WorkerStatus(
            worker=self._config.worker,
            role=Role.ATTENTION,
            state=self._state,
            incarnation=self.incarnation,
            pid=os.getpid(),
            node=self._location.node,
            addresses=(self._service.address,) if self._service is not None else (),
            epoch=self._epoch,
            memory_bytes=psutil.Process().memory_info().rss,
        )

    def close(self) -> None:
        """Stop the service, the engine and the links, in that order."""
        self._resources.close()

    def _report(self, done: int, total: int) -> None:
        self._loaded = (done, total)

    def _between_steps(self, action: Callable[[], T]) -> T:
        """Run an action that changes routes while no step runs."""
        with self._starting:
            if self._service is None:  # the engine's thread does not run yet
                return action()
        return self._engine.between_steps(action)

    def _restore(self, link: Link) -> None:
        """Use a link to a host that was lost."""

        def switch() -> None:
            dispatcher = self._dispatcher
            if (
                dispatcher.published.incarnations.get(link.peer) != link.peer_incarnation
                or link.peer in dispatcher.links
            ):
                link.abort()  # another topology was published meanwhile, or another link is up
                return
            dispatcher.switch(dispatcher.published, {**dispatcher.links, link.peer: link})

        self._between_steps(switch)

    def _dial(self, address: HostAddress) -> Link:
        config = self._checkpoint.config
        hello = Hello(
            role=LinkRole.ATTENTION,
            id=self._config.worker,
            incarnation=self.incarnation,
            model_hash=self._checkpoint.model_hash,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            num_slices=self._config.expert_slices,
            width=config.hidden_size,
            dtype=dtype_name(self._dtype),
            wire=self._config.wire,
            arithmetic=arithmetic(self._dtype, self._config.device, self._config.weights),
        )
        return connect(
            address.seen_from(self._location.node),
            hello=hello,
            secret=self._config.secret,
            limits=LinkLimits(),
            timeout_s=CONNECT_TIMEOUT_S,
        )


def usable(
    taken: Mapping[str, Link],
    in_use_then: Mapping[str, Link],
    in_use_now: Mapping[str, Link],
    incarnations: Mapping[str, int],
) -> dict[str, Link]:
    """Return the links that a new table can use, given those taken for it while steps ran on.

    One that was in use then and is no more has gone down since; one that is in use now was restored since.
    """
    links = {
        host: link for host, link in taken.items() if in_use_then.get(host) is not link or in_use_now.get(host) is link
    }
    restored = {host: link for host, link in in_use_now.items() if incarnations.get(host) == link.peer_incarnation}
    return links | restored
