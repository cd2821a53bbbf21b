"""The driver's half of a cluster: owns every process of it. What the workers are told is the controller's matter.

The driver owns them, not the controller, so that they end with the driver and outlive the controller. Knows no Ray:
processes come from a `Spawner`.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Protocol

from cluster.controller import STATUS_TIMEOUT_S, ClusterPlan
from cluster.handle import PROGRESS_INTERVAL_S, Handle, results, settled
from cluster.worker import LoadProgress, Role, State, WorkerConfig, WorkerStatus
from llama4_dist.errors import UnavailableError

ANSWER_MARGIN_S = 5.0  # the controller keeps the time itself and can say which worker was late
CLOSE_TIMEOUT_S = 5.0

OnProgress = Callable[[LoadProgress], None]


class Spawner(Protocol):
    """Where processes come from."""

    def spawn(self, configs: Sequence[WorkerConfig]) -> Sequence[Handle]: ...
    def spawn_controller(self, plan: ClusterPlan, workers: Sequence[Handle]) -> Handle: ...
    def close(self) -> None: ...


class ClusterProcesses:
    """The workers of one cluster and its controller. `start` returns the engines' addresses or leaves nothing."""

    def __init__(self, plan: ClusterPlan, spawner: Spawner, *, progress: OnProgress | None = None) -> None:
        self._plan = plan
        self._spawner = spawner
        self._progress = progress or (lambda event: None)
        self._reported: dict[str, LoadProgress] = {}
        self._workers: list[Handle] = []
        self._controller: Handle | None = None

    def start(self, *, timeout_s: float) -> tuple[str, ...]:
        """Spawn all and let the controller bring the workers up; return where the attention workers serve."""
        deadline = time.monotonic() + timeout_s
        try:
            for configs in (self._plan.experts, self._plan.attention):
                workers = self._spawner.spawn(configs)
                self._workers += workers
                for worker in workers:
                    self._report(LoadProgress(worker=worker.worker, role=worker.role, state=State.NEW))
            controller = self._controller = self._spawner.spawn_controller(self._plan, self._workers)
            starting = {controller: controller.call("start", deadline - time.monotonic())}
            deadline += ANSWER_MARGIN_S
            while not settled(starting, PROGRESS_INTERVAL_S) and time.monotonic() < deadline:
                self._report_progress(controller, PROGRESS_INTERVAL_S)
            addresses: tuple[str, ...] = results(starting, deadline, doing="start")[controller.worker]
            self._report_progress(controller, ANSWER_MARGIN_S)
        except BaseException:
            self.close()
            raise
        return addresses

    def status(self) -> tuple[WorkerStatus, ...]:
        """Ask the controller for itself and every worker; UnavailableError when it does not answer."""
        if (controller := self._controller) is None:
            raise UnavailableError("the cluster is closed: start another")
        deadline = time.monotonic() + STATUS_TIMEOUT_S + ANSWER_MARGIN_S
        rows: tuple[WorkerStatus, ...] = results(
            {controller: controller.call("status")}, deadline, doing="tell the status"
        )[controller.worker]
        return rows

    def close(self) -> None:
        """End the controller, then every worker, attention first: politely, then by force."""
        if self._controller is not None:
            self._controller.kill()  # it holds nothing
            self._controller = None
        for role in (Role.ATTENTION, Role.EXPERT):
            wait([w.call("close") for w in self._workers if w.role is role], timeout=CLOSE_TIMEOUT_S)
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._spawner.close()

    def _report_progress(self, controller: Handle, timeout_s: float) -> None:
        """Pass on what changed since the last time; a controller that is late or gone is `start`'s to notice."""
        answer = controller.call("progress")
        wait([answer], timeout=timeout_s)
        if answer.done() and answer.exception() is None:
            for event in answer.result():
                self._report(event)

    def _report(self, event: LoadProgress) -> None:
        if self._reported.get(event.worker) != event:
            self._reported[event.worker] = event
            self._progress(event)
