"""Answers of an expert host: frames of one layer through the experts together, replies to the workers that asked.

Knows no sockets and no queue. Memory for a reply is taken before its rows are computed.
"""

from torch import Tensor

from llama4_dist.dispatch.computation import Computation, Job
from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.frame_queue import QueuedFrames
from llama4_dist.dispatch.layout import Groups
from llama4_dist.dispatch.links.link import FrameHeader, FrameKind
from llama4_dist.dispatch.stats import HostStats
from llama4_dist.dispatch.worker_link import WorkerLink
from llama4_dist.dispatch.worker_links import WorkerLinks
from llama4_dist.errors import LinkDownError

_new_tuple = tuple.__new__  # a quarter of what a named tuple's own constructor takes


class Answers:
    """Computes at most `max_rows` rows at a time."""

    def __init__(
        self, workers: WorkerLinks, computation: Computation, max_rows: int, stats: HostStats, faults: FaultPoints
    ) -> None:
        self._workers = workers
        self._computation = computation
        self._max_rows = max_rows
        self._stats = stats
        self._faults = faults

    def compute(self, layer: int, frames: QueuedFrames) -> None:
        """Compute one layer's frames, pooling as many as `max_rows` allows at a time."""
        if len(frames) == 1:
            self.compute_together(layer, frames)
            return
        batch: QueuedFrames = []
        num_rows = 0
        for entry in frames:
            rows = entry[1].header.num_rows
            if batch and num_rows + rows > self._max_rows:
                self.compute_together(layer, batch)
                batch, num_rows = [], 0
            batch.append(entry)
            num_rows += rows
        self.compute_together(layer, batch)

    def compute_together(self, layer: int, batch: QueuedFrames) -> None:
        """Compute frames together and post the replies; keep account after that, while the workers read them."""
        jobs = self._take_reply_memory(batch)
        if not jobs:
            return
        if not self._computation.run(layer, jobs):
            for job in jobs:
                self._workers.refuse(job.worker, job.frame, "COMPUTE_FAILED", job.frame.header.groups)
            return
        self._faults.hit("computing")
        for worker, frame, _, y_RD in jobs:
            self._workers.post(worker, _new_tuple(FrameHeader, (FrameKind.REPLY, *frame.header[1:6], (), "")), y_RD)
        for job in jobs:
            self._account(job)

    def at_once(self, worker: WorkerLink, layer: int, groups: Groups, x_RD: Tensor) -> Tensor | None:
        """Compute rows of the one worker there is without a frame; None where anything is not as usual."""
        holds = self._computation.compute.holds
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

    def _take_reply_memory(self, batch: QueuedFrames) -> list[Job]:
        jobs = []
        for worker, _ in batch:
            worker.reclaim()
        for worker, frame in batch:
            if self._workers.by_id.get(worker.link.peer) is not worker:
                continue  # nobody is there to answer
            rows_RD = frame.rows_RD
            assert rows_RD is not None, "links refuse ROWS frames without rows"
            try:
                y_RD = worker.reply_rows(frame.header.num_rows, rows_RD.device)
            except LinkDownError as error:
                self._workers.drop(worker, error)
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
