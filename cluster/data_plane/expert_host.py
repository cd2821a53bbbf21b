"""An expert host: maps its own (layer, expert) weights and serves them on a Unix socket and on TCP; no KV, no Ray."""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from cluster.data_plane.unhurried import unhurried
from cluster.operation import HostLoad
from cluster.planning.placement import Pair
from cluster.presence import Presence
from cluster.reading import HostReading
from cluster.worker import HostAddress, LoadProgress, Location, State, WorkerConfig, WorkerStatus, url_host
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.handshake import HostIdentity
from llama4_dist.dispatch.links.link import LinkLimits
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.dispatch.stats import HostStats
from llama4_dist.engine.build import resolve_dtype
from llama4_dist.engine.devices import arithmetic, open_experts
from llama4_dist.errors import PreconditionError, UnavailableError
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.expert_store import ExpertStore
from llama4_dist.native import threads

log = logging.getLogger(__name__)


class ExpertHost:
    """One host. `load` maps and listens; `close` may be called at any time, and again.

    `faults` is how a test strikes it at a moment of its choice.
    """

    def __init__(self, config: WorkerConfig, location: Location, *, faults: FaultPoints | None = None) -> None:
        self._config = config
        self._presence = Presence(worker=config.worker, role=config.role, location=location)
        self._faults = faults
        self._store: ExpertStore | None = None
        self._address: HostAddress | None = None
        self._server: ExpertServer | None = None
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._resources = ExitStack()

    def location(self) -> Location:
        """Say where this host runs."""
        return self._presence.location

    def load(self, pairs: Sequence[Pair]) -> HostAddress:
        """Map `pairs`, listen, and serve from a thread of its own; return where."""
        config, location = self._config, self._presence.location
        self._presence.state = State.LOADING
        threads.set_count(config.num_threads)
        checkpoint = Checkpoint.open(config.model_dir)
        self._resources.callback(checkpoint.close)
        geometry = checkpoint.config
        dtype = resolve_dtype(config.dtype, geometry.dtype)
        self._store = open_experts(
            checkpoint,
            dtype=dtype,
            device=config.device,
            weight_format=config.weights,
            num_slices=config.expert_slices,
            capacity_bytes=config.capacity_bytes,
            residency_bytes=config.expert_memory_bytes,
        )
        if is_native(dtype, config.device):
            threads.leave_to_native()
        self.add(pairs)
        server = ExpertServer(
            identity=HostIdentity(
                host=config.worker,
                incarnation=self._presence.incarnation,
                model_hash=checkpoint.model_hash,
                num_layers=geometry.num_layers,
                num_experts=geometry.num_experts,
                num_slices=config.expert_slices,
                arithmetic=arithmetic(dtype, config.device, config.weights),
            ),
            compute=self._store,
            width=geometry.hidden_size,
            dtype=dtype,
            limits=LinkLimits(),
            pool_window_s=config.pool_window_s,
            wire=config.wire,
            faults=self._faults,
        )
        path = config.run_dir / f"{config.worker}-{self._presence.incarnation}.sock"
        unix = Listener(f"unix:{path}", secret=config.secret)
        tcp = Listener(f"tcp:{url_host(location.address)}:0", secret=config.secret)
        self._resources.callback(path.unlink, missing_ok=True)
        server.add_listener(unix)
        server.add_listener(tcp)
        thread = threading.Thread(target=self._serve, args=(server,), name=config.worker, daemon=True)
        thread.start()
        self._resources.callback(self._halt, server, thread)
        self._server = server
        self._address = HostAddress(
            host=config.worker,
            incarnation=self._presence.incarnation,
            node=location.node,
            unix=unix.address,
            tcp=tcp.address,
            machine=location.machine,
        )
        self._presence.state = State.READY
        log.info(
            "expert_host_ready host=%s incarnation=%d experts=%d",
            config.worker,
            self._presence.incarnation,
            self._presence.loaded[0],
        )
        return self._address

    def add(self, pairs: Sequence[Pair]) -> None:
        """Map more experts while those here are served; UnavailableError (NO_ROOM) beyond the capacity."""
        store = self._held()
        num_wanted = len(set(pairs) - store.holds)
        self._presence.note_loaded(0, num_wanted)
        unhurried(lambda: store.add(pairs, lambda num_done: self._presence.note_loaded(num_done, num_wanted)))

    def keep(self, pairs: Sequence[Pair]) -> int:
        """Let go of all but these: what was adopted meanwhile goes too. Return the bytes that are free again."""
        return self._held().keep(pairs)

    def restore(self, pairs: Sequence[Pair]) -> int:
        """Let go of all but these and what was adopted, which attention workers may be sending rows for."""
        return self._held().keep(pairs, and_adopted=True)

    def fingerprints(self, pairs: Sequence[Pair]) -> dict[Pair, str]:
        """Digest weights and golden rows of experts here; `ExpertStore.fingerprint` says of what."""
        store = self._held()
        return unhurried(lambda: {pair: store.fingerprint(pair) for pair in pairs if pair in store.holds})

    def address(self) -> HostAddress | None:
        """Say where this host listens; None before it does."""
        return self._address

    def arm(self, point: str, after: int = 1, action: str = "kill") -> None:
        """Let this process be struck at a fault point; PreconditionError unless it was started for that."""
        if self._faults is None:
            raise PreconditionError(f"{self._config.worker} cannot be struck: start it armable", reason="NOT_ARMABLE")
        self._faults.arm(point, after=after, action=action)

    def progress(self) -> LoadProgress:
        """Say how many experts are mapped."""
        return self._presence.progress()

    def stats(self) -> HostStats:
        """Return the counters of the serving half."""
        return self._server.stats() if self._server is not None else HostStats()

    def load_now(self) -> HostLoad:
        """Return what a planner and an operator want to know of this host's work."""
        stats, store = self.stats(), self._store
        residency = store.residency if store is not None else None
        return HostLoad(
            host=self._config.worker,
            incarnation=self._presence.incarnation,
            at_s=time.monotonic(),
            rows=dict(stats.rows_by_expert),
            compute_s=stats.compute_seconds,
            queue_depth=stats.queue_depth,
            bytes_held=store.bytes_held if store is not None else 0,
            num_resident=residency.num_resident if residency is not None else 0,
            num_mapped=len(store.holds) - residency.num_resident if store is not None and residency is not None else 0,
            residency_hits=residency.hits if residency is not None else 0,
            residency_misses=residency.misses if residency is not None else 0,
        )

    def reading(self) -> HostReading:
        """Return what is measured of this host."""
        stats = self.stats()
        return HostReading(
            load=self.load_now(),
            frames=stats.frames_in,
            pooled_frames=stats.pooled_frames,
            links=stats.links,
            adopted=stats.adopted,
            refusals=dict(stats.refusals),
            closed_links=dict(stats.closed_links),
        )

    def status(self) -> WorkerStatus:
        """Describe this host."""
        address = self._address
        return self._presence.status(
            addresses=(address.unix, address.tcp) if address is not None else (),
            experts=tuple(sorted(self._store.holds)) if self._store is not None else (),
        )

    def close(self) -> None:
        """Stop serving and unmap; the socket file goes too."""
        self._resources.close()
        with suppress(OSError):  # the last worker of the run on this node removes the folder
            self._config.run_dir.rmdir()

    def _held(self) -> ExpertStore:
        if self._store is None:
            raise UnavailableError(f"{self._config.worker} has not loaded: call `load` first")
        return self._store

    def _serve(self, server: ExpertServer) -> None:
        """Run the server; should it fail, its links go down, so that workers turn to another replica at once."""
        try:
            server.run(self._stop)
        except Exception:
            log.exception("expert_host_failed host=%s", self._config.worker)
            with self._ending:
                self._presence.state = State.LOST
                server.close()

    def _halt(self, server: ExpertServer, thread: threading.Thread) -> None:
        """End the serving thread and close the server, unless it failed and did so itself."""
        self._stop.set()
        with self._ending:
            failed = self._presence.state is State.LOST
            if not failed:
                server.wake()
        thread.join()
        if not failed:
            server.close()
        self._presence.state = State.LOST
