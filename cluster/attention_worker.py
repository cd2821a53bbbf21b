"""An attention worker: the engine of one model copy, links to every expert host, and the gRPC service; no Ray."""

import logging
import os
import time
from contextlib import ExitStack

import psutil
import torch

from cluster.placement import routing_table
from cluster.worker import LoadProgress, Location, Role, State, Topology, WorkerConfig, WorkerStatus, url_host
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.handshake import Hello
from llama4_dist.dispatch.handshake import Role as LinkRole
from llama4_dist.dispatch.links.link import Link, LinkLimits, dtype_name
from llama4_dist.dispatch.links.socket import connect
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.engine.build import build_engine, resolve_dtype
from llama4_dist.engine.local import LocalEngine
from llama4_dist.rpc.engine_service import EngineServer

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0


class AttentionWorker:
    """One worker: `load`, then `publish` a topology, then `serve`. Later topologies are published while it serves."""

    def __init__(self, config: WorkerConfig, location: Location) -> None:
        self._config = config
        self._location = location
        self.incarnation = time.time_ns() // 1_000_000
        self._state = State.NEW
        self._loaded = (0, 0)
        self._epoch = 0
        self._links: dict[str, Link] = {}
        self._service: EngineServer | None = None
        self._resources = ExitStack()

    def location(self) -> Location:
        """Say where this worker runs."""
        return self._location

    def load(self) -> None:
        """Open the checkpoint and build the engine, without any expert host yet."""
        config = self._config
        self._state = State.LOADING
        torch.set_num_threads(config.num_threads)
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
            device=config.device,
        )
        self._resources.callback(self._dispatcher.close)
        self._engine: LocalEngine = build_engine(
            checkpoint,
            self._dispatcher,
            options=config.options,
            dtype=self._dtype,
            device=config.device,
            progress=self._report,
        )
        self._resources.callback(self._engine.close)

    def serve(self) -> str:
        """Start the engine and its service; return the service's address."""
        self._service = EngineServer(self._engine, host=url_host(self._location.address), secret=self._config.secret)
        self._resources.callback(self._service.close)
        self._state = State.READY
        return self._service.address

    def publish(self, topology: Topology) -> int:
        """Connect to new hosts and switch to the topology between two steps; return its epoch."""
        table = routing_table(
            topology.placement,
            epoch=topology.epoch,
            incarnations={host: address.incarnation for host, address in topology.hosts.items()},
            expert_width=self._checkpoint.config.expert_width,
        )
        links = {
            host: self._linked(host, address.incarnation) or self._connect(address.seen_from(self._location.node))
            for host, address in topology.hosts.items()
        }
        if self._service is None:
            self._dispatcher.switch(table, links)
        else:
            self._engine.between_steps(lambda: self._dispatcher.switch(table, links))
        self._links, self._epoch = links, topology.epoch
        log.info("topology_adopted worker=%s epoch=%d hosts=%d", self._config.worker, self._epoch, len(links))
        return self._epoch

    def progress(self) -> LoadProgress:
        """Say how many tensors are loaded."""
        done, total = self._loaded
        return LoadProgress(worker=self._config.worker, role=Role.ATTENTION, state=self._state, done=done, total=total)

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

    def _linked(self, host: str, incarnation: int) -> Link | None:
        """Return the link we have to this life of a host."""
        link = self._links.get(host)
        return link if link is not None and link.peer_incarnation == incarnation else None

    def _connect(self, address: str) -> Link:
        config = self._checkpoint.config
        hello = Hello(
            role=LinkRole.ATTENTION,
            id=self._config.worker,
            incarnation=self.incarnation,
            model_hash=self._checkpoint.model_hash,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            width=config.hidden_size,
            dtype=dtype_name(self._dtype),
        )
        return connect(
            address, hello=hello, secret=self._config.secret, limits=LinkLimits(), timeout_s=CONNECT_TIMEOUT_S
        )
