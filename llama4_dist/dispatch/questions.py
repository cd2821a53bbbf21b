"""What attention workers ask of an expert host: frames are read, and refused where what they ask for is not here.

Experts that no other host serves any more are brought here (adoption) when a frame says so.
"""

import logging

from llama4_dist.dispatch.expert_compute import ExpertCompute
from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.frame_queue import QueuedFrames
from llama4_dist.dispatch.layout import Groups
from llama4_dist.dispatch.links.link import Frame, FrameKind
from llama4_dist.dispatch.stats import HostStats
from llama4_dist.dispatch.worker_link import WorkerLink
from llama4_dist.dispatch.worker_links import WorkerLinks
from llama4_dist.errors import FrameError, LinkDownError, Llama4Error

log = logging.getLogger(__name__)

_QUESTIONS = frozenset({FrameKind.ROWS, FrameKind.ADOPT})


class Questions:
    """Reads workers' links for `host`, which computes with `compute`."""

    def __init__(
        self, host: str, workers: WorkerLinks, compute: ExpertCompute, stats: HostStats, faults: FaultPoints
    ) -> None:
        self._host = host
        self._workers = workers
        self._compute = compute
        self._stats = stats
        self._faults = faults

    def read(self, worker: WorkerLink, arrived: QueuedFrames) -> None:
        """Add a worker's questions that can be answered to `arrived`."""
        try:
            for frame in worker.link.poll(0.0):
                if self._accepts(worker, frame):
                    arrived.append((worker, frame))
        except LinkDownError as error:
            self._workers.drop(worker, error)

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
                    self._workers.refuse(worker, frame, reason, missing)
                return not reason
        return True

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
        log.warning("experts_adopted host=%s layer=%d experts=%s", self._host, layer, experts)
        self._stats.adopted += len(experts)
        return ""
