"""One layer's frames through the experts, rows of several frames in one pool. Knows no links."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama4_dist.dispatch.expert_compute import ExpertCompute
from llama4_dist.dispatch.layout import Groups
from llama4_dist.dispatch.links.link import Frame
from llama4_dist.dispatch.pool import gather, plan_pool, scatter
from llama4_dist.dispatch.stats import HostStats
from llama4_dist.dispatch.worker_link import WorkerLink

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One frame of a computation. A named tuple because one is made per frame."""

    worker: WorkerLink
    frame: Frame
    x_RD: Tensor
    y_RD: Tensor


class Computation:
    """Runs the experts; keeps the pool that rows of several frames are brought together in."""

    def __init__(self, compute: ExpertCompute, width: int, dtype: torch.dtype, max_rows: int, stats: HostStats) -> None:
        self.compute = compute
        self._max_rows = max_rows
        self._stats = stats
        self._pool_x_RD = torch.empty(0, width, dtype=dtype)
        self._pool_y_RD = torch.empty(0, width, dtype=dtype)

    def run(self, layer: int, jobs: Sequence[Job]) -> bool:
        """Write every job's `y_RD`; return whether that succeeded."""
        if len(jobs) == 1:  # straight from the receive slot into the reply
            _, frame, x_RD, y_RD = jobs[0]
            return self.run_one(layer, frame.header.groups, x_RD, y_RD)
        return self._timed(layer, self._run_pooled, layer, jobs)

    def run_one(self, layer: int, groups: Groups, x_RD: Tensor, y_RD: Tensor) -> bool:
        """Write the answer to one question; return whether that succeeded."""
        return self._timed(layer, self.compute, layer, groups, x_RD, y_RD)

    def _timed(self, layer: int, compute: Callable[..., None], *arguments: Any) -> bool:
        started = time.perf_counter()
        try:
            compute(*arguments)
        except (RuntimeError, KeyError):
            # Torch reports exhausted memory and device faults by RuntimeError, and by KeyError an expert is missing
            # that was let go after its rows had come. The rows are well formed: another host may succeed.
            log.exception("compute_failed layer=%d", layer)
            return False
        self._stats.compute_seconds += time.perf_counter() - started
        self._stats.computations += 1
        return True

    def _run_pooled(self, layer: int, jobs: Sequence[Job]) -> None:
        plan = plan_pool([job.frame.header.groups for job in jobs])
        if len(self._pool_x_RD) < plan.num_rows:
            size = (max(plan.num_rows, self._max_rows), self._pool_x_RD.shape[1])
            self._pool_x_RD = torch.empty(size, dtype=self._pool_x_RD.dtype, device=jobs[0].x_RD.device)
            self._pool_y_RD = torch.empty_like(self._pool_x_RD)
        x_RD, y_RD = self._pool_x_RD[: plan.num_rows], self._pool_y_RD[: plan.num_rows]
        gather(plan, [job.x_RD for job in jobs], x_RD)
        self.compute(layer, plan.groups, x_RD, y_RD)
        scatter(plan, y_RD, [job.y_RD for job in jobs])
        self._stats.pooled_frames += len(jobs)
