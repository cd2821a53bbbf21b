"""An attention worker: the engine of one model copy, links to every expert host, and the gRPC service; no Ray."""

from collections.abc import Mapping
from contextlib import ExitStack

from cluster.data_plane.epochs import Epochs
from cluster.data_plane.serving import Serving
from cluster.data_plane.topology_follower import follower_of
from cluster.presence import Presence
from cluster.worker import (
    Adopted,
    HostAddress,
    LoadProgress,
    Location,
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
        self._presence = Presence(worker=config.worker, role=config.role, location=location)
        self._serving = Serving(config, location)
        self._epochs = Epochs()
        self._resources = ExitStack()

    @property
    def epoch(self) -> int:
        """The epoch in use."""
        return self._epochs.epoch

    def location(self) -> Location:
        """Say where this worker runs."""
        return self._presence.location

    def load(self) -> None:
        """Open the checkpoint and build the engine, without any expert host yet."""
        config = self._config
        self._presence.state = State.LOADING
        threads.set_count(config.num_threads)
        checkpoint = Checkpoint.open(config.model_dir)
        self._resources.callback(checkpoint.close)
        dtype = resolve_dtype(config.dtype, checkpoint.config.dtype)
        follower = self._follower = follower_of(
            config,
            checkpoint,
            self._epochs,
            incarnation=self._presence.incarnation,
            node=self._presence.location.node,
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
            progress=self._presence.note_loaded,
        )
        self._resources.callback(self._engine.close)
        self._resources.callback(follower.close)

    def serve(self) -> str:
        """Start the engine and its service; return the service's address."""
        address = self._serving.serve(self._engine)
        self._resources.callback(self._serving.close)
        self._presence.state = State.READY
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
        return self._presence.progress()

    def queue_age_s(self) -> float:
        """Say how long the oldest request has waited to be admitted."""
        return self._engine.stats().max_queue_age_s

    def status(self) -> WorkerStatus:
        """Describe this worker."""
        return self._presence.status(
            addresses=self._serving.addresses,
            epoch=self._epochs.epoch,
        )

    def close(self) -> None:
        """Stop the service, the engine and the links, in that order; what was traced is sent."""
        self._resources.close()
        tracing.flush()
