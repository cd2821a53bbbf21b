"""An attention worker: the engine of one model copy, links to every expert host, and the gRPC service; no Ray."""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack

import psutil

from cluster.data_plane.epochs import Epochs
from cluster.data_plane.serving import Serving
from cluster.data_plane.topology_follower import follower_of
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
)
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.build import build_engine, resolve_dtype
from llama4_dist.engine.devices import rows_device
from llama4_dist.engine.local import LocalEngine
from llama4_dist.native import threads
from llama4_dist.telemetry import tracing


class AttentionWorker:
    """One worker: `load`, `connect` and `publish` a topology, `serve`; more are published while it serves."""

    def __init__(self, config: WorkerConfig, location: Location) -> None:
        self._config = config
        self._location = location
        self.incarnation = time.time_ns() // 1_000_000
        self._state = State.NEW
        self._loaded = (0, 0)
        self._serving = Serving(config, location)
        self._epochs = Epochs()
        self._resources = ExitStack()

    @property
    def epoch(self) -> int:
        """The epoch in use."""
        return self._epochs.epoch

    def location(self) -> Location:
        """Say where this worker runs."""
        return self._location

    def load(self) -> None:
        """Open the checkpoint and build the engine, without any expert host yet."""
        config = self._config
        self._state = State.LOADING
        threads.set_count(config.num_threads)
        checkpoint = Checkpoint.open(config.model_dir)
        self._resources.callback(checkpoint.close)
        dtype = resolve_dtype(config.dtype, checkpoint.config.dtype)
        follower = self._follower = follower_of(
            config,
            checkpoint,
            self._epochs,
            incarnation=self.incarnation,
            node=self._location.node,
            device=rows_device(dtype, config.device),
            between_steps=self._serving.between_steps,
        )
        self._resources.callback(follower.dispatcher.close)
        self._engine: LocalEngine = build_engine(
            checkpoint,
            follower.dispatcher,
            options=config.options,
            dtype=dtype,
            device=config.device,
            weights=config.weights,
            progress=self._report,
        )
        self._resources.callback(self._engine.close)
        self._resources.callback(follower.close)

    def serve(self) -> str:
        """Start the engine and its service; return the service's address."""
        address = self._serving.serve(self._engine)
        self._resources.callback(self._serving.close)
        self._state = State.READY
        return address

    def connect(self, hosts: Mapping[str, HostAddress]) -> None:
        """Do what `TopologyFollower.connect` does."""
        self._follower.connect(hosts)

    def publish(self, topology: Topology) -> Adopted:
        """Do what `TopologyFollower.publish` does."""
        return self._follower.publish(topology)

    def topology(self, controller: int = 0) -> Topology | None:
        """Return what this worker was told last, for a controller that has to begin anew.

        From now on it takes nothing of an older controller, whose last word may still be on its way.
        """
        return self._epochs.claim(controller)

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
            addresses=self._serving.addresses,
            epoch=self._epochs.epoch,
            memory_bytes=psutil.Process().memory_info().rss,
            cpu_s=sum(psutil.Process().cpu_times()[:2]),
        )

    def close(self) -> None:
        """Stop the service, the engine and the links, in that order; what was traced is sent."""
        self._resources.close()
        tracing.flush()

    def _report(self, done: int, total: int) -> None:
        self._loaded = (done, total)
