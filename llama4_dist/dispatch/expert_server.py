"""The expert host's half: one thread takes frames of all attention workers, pools them per layer, computes, replies.

This file says who is served, and when; what is asked is read in `questions`, computed and answered in `answers`.
Nothing waits for a particular worker: a slow or dead one costs only its own link. Weights and arithmetic are behind
`ExpertCompute`.
"""

import threading
from functools import partial

import torch

from llama4_dist.dispatch.answers import Answers
from llama4_dist.dispatch.computation import Computation
from llama4_dist.dispatch.expert_compute import ExpertCompute
from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.frame_queue import FrameQueue, QueuedFrames
from llama4_dist.dispatch.handshake import Hello, HostIdentity, Role
from llama4_dist.dispatch.links.hub import Hub
from llama4_dist.dispatch.links.inproc import inproc_pair
from llama4_dist.dispatch.links.link import Link, LinkLimits, dtype_name
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.dispatch.links.wire import Wire, WireFormat, WireLink
from llama4_dist.dispatch.questions import Questions
from llama4_dist.dispatch.stats import HostStats
from llama4_dist.dispatch.worker_links import WorkerLinks
from llama4_dist.errors import HandshakeError, LinkDownError

_IDLE_S = 1.0


class ExpertServer:
    """Serves `compute` to every attached link. Not thread-safe; only the event given to `run` may be set from outside.

    Frames of one layer that are ready together share one computation. `pool_window_s` is how long a frame may wait for
    the other workers' frames of its layer; it never waits when one worker is connected.
    """

    def __init__(
        self,
        *,
        identity: HostIdentity,
        compute: ExpertCompute,
        width: int,
        dtype: torch.dtype,
        limits: LinkLimits,
        pool_window_s: float = 0.0,
        faults: FaultPoints | None = None,
        wire: str = Wire.MODEL,
    ) -> None:
        self.identity = identity
        self.limits = limits
        self._faults = faults = faults or FaultPoints()
        self._queue = FrameQueue(pool_window_s)
        self._stats = stats = HostStats()
        hello = Hello(
            role=Role.EXPERT,
            id=identity.host,
            incarnation=identity.incarnation,
            model_hash=identity.model_hash,
            width=width,
            dtype=dtype_name(dtype),
            num_layers=identity.num_layers,
            num_experts=identity.num_experts,
            num_slices=identity.num_slices,
            wire=wire,
            arithmetic=identity.arithmetic,
        )
        self._form = WireFormat(wire, width, dtype)
        self._hub = Hub(hello, limits, self._admit, stats.closed_links)
        self._workers = WorkerLinks(self._hub, width, dtype, self._form, stats, faults)
        self._questions = Questions(identity.host, self._workers, compute, stats, faults)
        computation = Computation(compute, width, dtype, limits.max_rows, stats)
        self._answers = Answers(self._workers, computation, limits.max_rows, stats, faults)

    def add_listener(self, listener: Listener) -> None:
        """Let workers connect there; the server closes it with itself."""
        self._hub.add_listener(listener)

    def attach(self, link: Link) -> None:
        """Serve a link whose peer is known."""
        self._workers.attach(link)

    def open_inproc(self, *, worker: str, incarnation: int) -> Link:
        """Return a link to this server for a dispatcher in the same thread; its `poll` runs the server's."""
        link, end = inproc_pair(
            worker=worker,
            host=self.identity.host,
            limits=self.limits,
            worker_incarnation=incarnation,
            host_incarnation=self.identity.incarnation,
        )
        link.drive = lambda: self.poll(0.0)
        if self._form.wire:
            self.attach(WireLink(end, self._form))
            return WireLink(link, self._form)
        self.attach(end)
        link.answer, link.is_alone = partial(self._answers.at_once, self._workers.by_id[worker]), self._has_one_worker
        return link

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set; call `wake` after setting it to be heard at once."""
        while not stop.is_set():
            self.poll(_IDLE_S)

    def wake(self) -> None:
        """Make a waiting `poll` return. May be called from any thread."""
        self._hub.wake()

    def poll(self, timeout_s: float) -> int:
        """Take what has arrived, compute what is due, send replies; return the number of frames answered."""
        if self._queue.layers:  # they wait for their window
            timeout_s = self._queue.shorten(timeout_s)
        if timeout_s > 0.0:
            self._faults.hit("idle")
        ready, new = self._hub.wait(timeout_s)
        for link in new:
            self.attach(WireLink(link, self._form) if self._form.wire else link)
        arrived: QueuedFrames = []
        for link in ready:
            worker = self._workers.by_id.get(link.peer)
            if worker is not None and worker.link is link:  # it may have been dropped a moment ago
                self._questions.read(worker, arrived)
        if len(arrived) == 1 and self._queue.is_idle:  # nothing to wait for, nothing to pool
            self._answers.compute_together(arrived[0][1].header.layer, arrived)
            return 1
        for worker, frame in arrived:
            self._queue.add(worker, frame)
        return self._compute_due() if self._queue.layers else 0

    def close(self) -> None:
        """Close every link and listener; workers see their links go down."""
        for worker in list(self._workers.by_id.values()):
            self._workers.drop(worker, LinkDownError("the server stops", reason="SERVER_STOPPED"))
        self._hub.close()

    def stats(self) -> HostStats:
        self._stats.queue_depth = self._queue.num_frames
        return self._stats

    def _admit(self, peer: Hello) -> None:
        """Refuse a second link of one worker: the older stays. A worker's new life replaces its old one."""
        present = self._workers.by_id.get(peer.id)
        if present is not None:
            arrived: QueuedFrames = []
            self._questions.read(present, arrived)  # it may have gone without our noticing
            for entry in arrived:
                self._queue.add(*entry)
            present = self._workers.by_id.get(peer.id)
        if present is None:
            if len(self._workers.by_id) >= self.limits.max_links:
                raise HandshakeError(f"{len(self._workers.by_id)} workers are connected", reason="TOO_MANY_LINKS")
        elif peer.incarnation == present.link.peer_incarnation:
            raise HandshakeError(f"worker {peer.id!r} is already connected", reason="DUPLICATE_PEER")
        elif peer.incarnation < present.link.peer_incarnation:
            raise HandshakeError(f"worker {peer.id!r} has a newer incarnation here", reason="STALE_INCARNATION")
        else:
            self._workers.drop(present, LinkDownError("a newer incarnation is here", reason="SUPERSEDED"))

    def _has_one_worker(self) -> bool:
        """Tell whether nobody else is or may be served: frames are what everybody is served by in turn."""
        return len(self._workers.by_id) == 1 and not self._hub.listeners and not self._queue.layers

    def _compute_due(self) -> int:
        answered = 0
        for layer, frames in self._queue.take_due(len(self._workers.by_id)):
            answered += len(frames)
            self._answers.compute(layer, frames)
        return answered
