"""What a process of the cluster says of itself: who it is, where, how far its start is, what it takes of its node."""

import os
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from cluster.worker import LoadProgress, Location, Role, State, WorkerStatus


@dataclass(slots=True, kw_only=True)
class Presence:
    """One life of one process. It is named by its start in milliseconds, so that whoever comes back is told apart."""

    worker: str
    role: Role
    location: Location
    state: State = State.NEW
    incarnation: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    loaded: tuple[int, int] = (0, 0)  # done, total

    def note_loaded(self, done: int, total: int) -> None:
        """Remember how far the start is."""
        self.loaded = (done, total)

    def progress(self) -> LoadProgress:
        """Say how far the start is."""
        done, total = self.loaded
        return LoadProgress(worker=self.worker, role=self.role, state=self.state, done=done, total=total)

    def status(self, **more: Any) -> WorkerStatus:
        """Describe the process; `more` are fields of `WorkerStatus` that only the caller knows."""
        process = psutil.Process()
        return WorkerStatus(
            worker=self.worker,
            role=self.role,
            state=self.state,
            incarnation=self.incarnation,
            pid=os.getpid(),
            node=self.location.node,
            memory_bytes=process.memory_info().rss,
            cpu_s=sum(process.cpu_times()[:2]),
            **more,
        )
