"""The expert host's half: one thread takes frames of all attention workers, pools them per layer, computes, replies.

Nothing here waits for a particular worker: a slow or dead one costs only its own link. Weights and arithmetic are
behind `ExpertCompute`.
"""

import logging
import threading
from functools import partial

import torch
from torch import Tensor

from llama4_dist.dispatch.computation import Computation, Job
from llama4_dist.dispatch.expert_compute import ExpertCompute
from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.frame_queue import FrameQueue, QueuedFrames
from llama4_dist.dispatch.handshake import Hello, HostIdentity, Role
from llama4_dist.dispatch.layout import Groups
from llama4_dist.dispatch.links.hub import Hub
from llama4_dist.dispatch.links.inproc import inproc_pair
from llama4_dist.dispatch.links.link import Frame, FrameHeader, FrameKind, Link, LinkLimits, dtype_name
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.dispatch.links.socket import SocketLink
from llama4_dist.dispatch.links.wire import Wire, WireFormat, WireLink
from llama4_dist.dispatch.stats import HostStats
from llama4_dist.dispatch.worker_link import WorkerLink
from llama4_dist.errors import FrameError, HandshakeError, LinkDownError, Llama4Error

log = logging.getLogger(__name__)

_new_tuple = tuple.__new__  # a quarter of what a named tuple's own constructor takes
_IDLE_S = 1.0
_QUESTIONS = frozenset({FrameKind.ROWS, FrameKind.ADOPT})


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
        self._faults = faults or FaultPoints()
        self._compute = compute
        self._width = width
        self._dtype = dtype
        self._workers: dict[str, WorkerLink] = {}  # by worker id
        self._queue = FrameQueue(pool_window_s)
        self._stats = HostStats()
        self._computation = Computation(compute, width, dtype, limits.max_rows, self._stats)
        hello = Hello(
            role=Role.EXPERT,
            id=identity.host,
            incarnation=identity.incarnation,
            model_hash=identity.model_hash,
            width=width,
            dtype=dtype_name(dtype),
            num_layers=identity.num_layers,
            num_experts=identity.num_experts,
            wire=wire,
            arithmetic=identity.arithmetic,
        )
        self._form = WireFormat(wire, width, dtype)
        self._hub = Hub(hello, limits, self._admit, self._stats.closed_links)

    def add_listener(self, listener: Listener) -> None:
        """Let workers connect there; the server closes it with itself."""
        self._hub.add_listener(listener)

    def attach(self, link: Link) -> None:
        """Serve a link whose peer is known."""
        self._workers[link.peer] = WorkerLink(link, self._width, self._dtype)
        self._hub.add(link)
        self._stats.links += 1

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
        link.answer, link.is_alone = partial(self._answer_now, self._workers[worker]), self._has_one_worker
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
            worker = self._workers.get(link.peer)
            if worker is not None and worker.link is link:  # it may have been dropped a moment ago
                self._read(worker, arrived)
        if len(arrived) == 1 and self._queue.is_idle:  # nothing to wait for, nothing to pool
            self._compute_batch(arrived[0][1].header.layer, arrived)
            return 1
        for worker, frame in arrived:
            self._queue.add(worker, frame)
        return self._compute_due() if self._queue.layers else 0

    def close(self) -> None:
        """Close every link and listener; workers see their links go down."""
        for worker in list(self._workers.values()):
            self._drop(worker, LinkDownError("the server stops", reason="SERVER_STOPPED"))
        self._hub.close()

    def stats(self) -> HostStats:
        self._stats.queue_depth = self._queue.num_frames
        return self._stats

    def _admit(self, peer: Hello) -> None:
        """Refuse a second link of one worker: the older stays. A worker's new life replaces its old one."""
        present = self._workers.get(peer.id)
        if present is not None:
            arrived: QueuedFrames = []
            self._read(present, arrived)  # it may have gone without our noticing
            for entry in arrived:
                self._queue.add(*entry)
            present = self._workers.get(peer.id)
        if present is None:
            if len(self._workers) >= self.limits.max_links:
                raise HandshakeError(f"{len(self._workers)} workers are connected", reason="TOO_MANY_LINKS")
        elif peer.incarnation == present.link.peer_incarnation:
            raise HandshakeError(f"worker {peer.id!r} is already connected", reason="DUPLICATE_PEER")
        elif peer.incarnation < present.link.peer_incarnation:
            raise HandshakeError(f"worker {peer.id!r} has a newer incarnation here", reason="STALE_INCARNATION")
        else:
            self._drop(present, LinkDownError("a newer incarnation is here", reason="SUPERSEDED"))

    def _read(self, worker: WorkerLink, arrived: QueuedFrames) -> None:
        """Add a worker's questions that can be answered to `arrived`."""
        try:
            for frame in worker.link.poll(0.0):
                if self._accepts(worker, frame):
                    arrived.append((worker, frame))
        except LinkDownError as error:
            self._drop(worker, error)

    def _accepts(self, worker: WorkerLink, frame: Frame) -> bool:
        """Tell whether a frame asks for what is here, or can be brought here; otherwise it is refused."""
        header = frame.header
        self._stats.frames_in += 1
        self._faults.hit("receiving")
        if header.kind not in _QUESTIONS:
            raise FrameError(f"worker {worker.link.peer!r} sent a {header.kind.name} frame", reason="KIND_UNEXPECTED")
        number, holds = header.layer, self._compute.holds
        for expert, _ in header.groups:
            if (number, expert) not in holds:
                missing = tuple(group for group in header.groups if (number, group[0]) not in holds)
                reason = self._adopt(number, missing) if header.kind == FrameKind.ADOPT else "WRONG_OWNER"
                if reason:
                    self._refuse(worker, frame, reason, missing)
                return not reason
        return True

    def _has_one_worker(self) -> bool:
        """Tell whether nobody else is or may be served: frames are what everybody is served by in turn."""
        return len(self._workers) == 1 and not self._hub.listeners and not self._queue.layers

    def _answer_now(self, worker: WorkerLink, layer: int, groups: Groups, x_RD: Tensor) -> Tensor | None:
        """Compute rows of the one worker there is without a frame; None where anything is not as usual."""
        holds = self._compute.holds
        for expert, _ in groups:
            if (layer, expert) not in holds:
                return None
        self._faults.hit("receiving")
        num_rows = x_RD.shape[0]
        y_RD = worker.scratch(num_rows, x_RD.device)
        if not self._computation.run_one(layer, groups, x_RD, y_RD):
            return None
        self._faults.hit("computing")
        self._stats.frames_in += 1
        self._count(worker, layer, groups, num_rows)
        return y_RD

    def _adopt(self, layer: int, groups: Groups) -> str:
        """Bring experts here that no other host serves; return why not, "" if it was done."""
        experts = [expert for expert, _ in groups]
        self._faults.hit("adopting")
        try:
            self._compute.adopt([(layer, expert) for expert in experts])
        except Llama4Error as error:
            log.warning("adoption_refused layer=%d experts=%s cause=%s", layer, experts, error)
            return error.reason
        except RuntimeError:  # torch is out of memory
            log.exception("adoption_failed layer=%d experts=%s", layer, experts)
            return "COMPUTE_FAILED"
        log.warning("experts_adopted host=%s layer=%d experts=%s", self.identity.host, layer, experts)
        self._stats.adopted += len(experts)
        return ""

    def _compute_due(self) -> int:
        answered = 0
        for layer, frames in self._queue.take_due(len(self._workers)):
            answered += len(frames)
            self._compute_layer(layer, frames)
        return answered

    def _compute_layer(self, layer: int, frames: list[tuple[WorkerLink, Frame]]) -> None:
        """Compute one layer's frames, pooling as many as `max_rows` allows at a time."""
        if len(frames) == 1:
            self._compute_batch(layer, frames)
            return
        batch: list[tuple[WorkerLink, Frame]] = []
        num_rows = 0
        for entry in frames:
            rows = entry[1].header.num_rows
            if batch and num_rows + rows > self.limits.max_rows:
                self._compute_batch(layer, batch)
                batch, num_rows = [], 0
            batch.append(entry)
            num_rows += rows
        self._compute_batch(layer, batch)

    def _compute_batch(self, layer: int, batch: list[tuple[WorkerLink, Frame]]) -> None:
        """Compute frames together and post the replies; keep account after that, while the workers read them."""
        jobs = self._take_reply_memory(batch)
        if not jobs:
            return
        if not self._computation.run(layer, jobs):
            for job in jobs:
                self._refuse(job.worker, job.frame, "COMPUTE_FAILED", job.frame.header.groups)
            return
        self._faults.hit("computing")
        for worker, frame, _, y_RD in jobs:
            self._post(worker, _new_tuple(FrameHeader, (FrameKind.REPLY, *frame.header[1:6], (), "")), y_RD)
        for job in jobs:
            self._account(job)

    def _take_reply_memory(self, batch: list[tuple[WorkerLink, Frame]]) -> list[Job]:
        jobs = []
        for worker, _ in batch:
            worker.reclaim()
        for worker, frame in batch:
            if self._workers.get(worker.link.peer) is not worker:
                continue  # nobody is there to answer
            rows_RD = frame.rows_RD
            assert rows_RD is not None, "links refuse ROWS frames without rows"
            try:
                y_RD = worker.reply_rows(frame.header.num_rows, rows_RD.device)
            except LinkDownError as error:
                self._drop(worker, error)
                continue
            jobs.append(Job(worker, frame, rows_RD, y_RD))
        return jobs

    def _account(self, job: Job) -> None:
        """Release an answered frame and count it."""
        header = job.frame.header
        job.frame.release()
        self._count(job.worker, header.layer, header.groups, header.num_rows)

    def _count(self, worker: WorkerLink, layer: int, groups: Groups, num_rows: int) -> None:
        stats = self._stats
        rows_by_expert = stats.rows_by_expert
        for expert, count in groups:
            rows_by_expert[layer, expert] += count
        stats.rows_by_worker[worker.link.peer] += num_rows
        stats.replies += 1

    def _refuse(self, worker: WorkerLink, frame: Frame, reason: str, groups: Groups) -> None:
        self._stats.refusals[reason] += 1
        frame.release()
        self._post(worker, frame.header._replace(kind=FrameKind.NACK, groups=groups, reason=reason), None)

    def _post(self, worker: WorkerLink, header: FrameHeader, rows_RD: Tensor | None) -> None:
        try:
            plain = worker.link.inner if isinstance(worker.link, WireLink) else worker.link
            if self._faults.due("half_reply") and isinstance(plain, SocketLink):
                plain.post_half(header, None if rows_RD is None else self._form.pack(rows_RD))
                self._faults.strike()
                return
            link = worker.link
            link.post(header, rows_RD)
            self._faults.hit("replied")
            if link.num_unsent:
                self._hub.watch_sending(link)
        except LinkDownError as error:
            self._drop(worker, error)

    def _drop(self, worker: WorkerLink, error: LinkDownError) -> None:
        """Close one worker's link; the others notice nothing."""
        if self._workers.get(worker.link.peer) is not worker:
            return
        log.warning("link_closed worker=%s reason=%s", worker.link.peer, error.reason)
        del self._workers[worker.link.peer]
        self._hub.remove(worker.link)
        worker.link.abort()
        self._stats.closed_links[error.reason] += 1
        self._stats.links -= 1
