"""The driver's half of a cluster: owns every process of it. What the workers are told is the controller's matter.

The driver owns them, not the controller, so that they end with the driver and outlive the controller. Knows no Ray:
processes come from a `Spawner`.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

from cluster.control_plane.members import STATUS_TIMEOUT_S
from cluster.handle import PROGRESS_INTERVAL_S, Handle, results, settled
from cluster.plan import ClusterPlan
from cluster.standing import Orders
from cluster.worker import LoadProgress, Role, State, WorkerConfig
from llama4_dist.errors import Llama4Error, UnavailableError

ANSWER_MARGIN_S = 5.0  # the controller keeps the time itself and can say which worker was late
CLOSE_TIMEOUT_S = 5.0

ORDERS_INTERVAL_S = 0.1
RECOVER_TIMEOUT_S = 60.0
ENGINES_RETRY_S = 1.0
HEAD_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]
OnEngines = Callable[[Mapping[str, str]], bool]  # worker id to address; False where one has to be told again


class Spawner(Protocol):
    """Where processes come from."""

    def spawn(self, configs: Sequence[WorkerConfig]) -> Sequence[Handle]: ...
    def spawn_controller(self, plan: ClusterPlan, workers: Sequence[Handle]) -> Handle: ...
    def end(self, worker: str) -> None: ...
    def answers(self, timeout_s: float) -> bool: ...
    def close(self) -> None: ...


class ClusterProcesses:
    """The workers of one cluster and its controller. `start` returns the engines' addresses or leaves nothing.

    Afterwards a thread carries out the controller's orders, starts a new controller when it is lost, and tells
    `on_engines` where attention workers serve whenever that changes, and again while it cannot reach one.
    """

    def __init__(
        self,
        plan: ClusterPlan,
        spawner: Spawner,
        *,
        progress: OnProgress | None = None,
        on_engines: OnEngines = lambda engines: True,
    ) -> None:
        self._plan = plan
        self._spawner = spawner
        self._progress = progress or (lambda event: None)
        self._on_engines = on_engines
        self._engines: Mapping[str, str] = {}
        self._engines_due_s = math.inf  # when to tell them again: one could not be reached
        self._reported: dict[str, LoadProgress] = {}
        self._workers: dict[str, Handle] = {}
        self._starting: set[str] = set()  # ids of processes on their way
        self._controller: Handle | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._steward = threading.Thread(target=self._serve_controller, name="processes", daemon=True)

    def start(self, *, timeout_s: float) -> Mapping[str, str]:
        """Spawn all and let the controller bring the workers up; return where each attention worker serves."""
        deadline = time.monotonic() + timeout_s
        try:
            for configs in (self._plan.experts, self._plan.stages, self._plan.attention):
                for worker in self._spawner.spawn(configs) if configs else ():
                    self._workers[worker.worker] = worker
                    self._report(LoadProgress(worker=worker.worker, role=worker.role, state=State.NEW))
            controller = self._controller = self._spawner.spawn_controller(self._plan, list(self._workers.values()))
            starting = {controller: controller.call("start", deadline - time.monotonic())}
            deadline += ANSWER_MARGIN_S
            while not settled(starting, PROGRESS_INTERVAL_S) and time.monotonic() < deadline:
                self._report_progress(controller, PROGRESS_INTERVAL_S)
            addresses: Mapping[str, str] = results(starting, deadline, doing="start")[controller.worker]
            self._report_progress(controller, ANSWER_MARGIN_S)
        except BaseException:
            self.close()
            raise
        self._engines = addresses
        self._steward.start()
        return addresses

    def ask(self, method: str, *arguments: object, timeout_s: float = STATUS_TIMEOUT_S + ANSWER_MARGIN_S) -> Any:
        """Call the controller; UnavailableError while there is none that answers."""
        controller = self._controller
        if controller is None:
            if self._stop.is_set():
                raise UnavailableError("the cluster was closed: start another", reason="DRAINING")
            raise UnavailableError(
                "the cluster has no controller just now: serving goes on, changes have to wait",
                reason="CONTROLLER_LOST",
                retry_after_s=1.0,
            )
        deadline = time.monotonic() + timeout_s
        return results({controller: controller.call(method, *arguments)}, deadline, doing=method)[controller.worker]

    def ask_worker(self, worker: str, method: str, *arguments: object) -> Any:
        """Call one worker, past the controller."""
        with self._lock:
            handle = self._workers.get(worker)
        if handle is None:
            raise UnavailableError(f"there is no worker {worker!r} just now", reason="WORKER_LOST")
        answers = results({handle: handle.call(method, *arguments)}, time.monotonic() + STATUS_TIMEOUT_S, doing=method)
        return answers[worker]

    def head_answers(self) -> bool:
        """Tell whether processes can be started and ended."""
        return self._spawner.answers(HEAD_TIMEOUT_S)

    def check_head(self) -> None:
        """Raise UnavailableError while no process can be started or ended."""
        if not self.head_answers():
            raise UnavailableError(
                "the head of Ray does not answer: serving goes on, changes have to wait",
                reason="HEAD_LOST",
                retry_after_s=5.0,
            )

    def close(self) -> None:
        """End the controller, then every worker, attention first: politely, then by force."""
        self._stop.set()
        if self._steward.ident is not None:
            self._steward.join()
        with self._lock:  # what starts from here on ends itself
            controller, self._controller = self._controller, None
            workers = list(self._workers.values())
            self._workers.clear()
        if controller is not None:
            controller.kill()  # it holds nothing
        for role in (Role.ATTENTION, Role.STAGE, Role.EXPERT):
            wait([worker.call("close") for worker in workers if worker.role is role], timeout=CLOSE_TIMEOUT_S)
        for worker in workers:
            self._spawner.end(worker.worker)
        self._spawner.close()

    def _serve_controller(self) -> None:
        """Carry out orders until the end; a defect or a lost Ray head costs a round, not the thread."""
        while not self._stop.wait(ORDERS_INTERVAL_S):
            try:
                self._serve_once()
            except Exception:
                log.exception("orders_failed")

    def _serve_once(self) -> None:
        controller = self._controller
        if controller is None:
            self._replace_controller()
            return
        answer = controller.call("orders")
        if not self._answered(answer, ANSWER_MARGIN_S):
            return  # busy, or stopped; a process that lives is never doubled
        error = answer.exception()
        if error is None:
            self._carry_out(controller, answer.result())
        elif isinstance(error, Llama4Error) and error.reason == "WORKER_LOST":
            log.warning("controller_lost")
            with self._lock:
                self._controller = None

    def _replace_controller(self) -> None:
        """Start a controller that learns everything from the workers."""
        with self._lock:
            workers = list(self._workers.values())
        controller = self._spawner.spawn_controller(self._plan, workers)
        recovery = controller.call("recover")
        if not self._answered(recovery, RECOVER_TIMEOUT_S) or recovery.exception() is not None:
            log.warning("controller_not_replaced cause=%s", recovery.exception() if recovery.done() else "timeout")
            controller.kill()
            return
        with self._lock:
            self._controller = controller
            late = [handle for handle in self._workers.values() if handle not in workers]
        for handle in late:  # they came up while nobody could be told
            controller.call("provide", handle)

    def _answered(self, call: Future[Any], timeout_s: float) -> bool:
        """Wait for an answer, but not beyond the end of the cluster."""
        deadline = time.monotonic() + timeout_s
        while not call.done() and not self._stop.is_set() and time.monotonic() < deadline:
            wait([call], timeout=PROGRESS_INTERVAL_S)
        return call.done()

    def _carry_out(self, controller: Handle, orders: Orders) -> None:
        for worker in orders.end:
            self._spawner.end(worker)
            with self._lock:
                self._workers.pop(worker, None)
            self._answered(controller.call("ended", worker), ANSWER_MARGIN_S)
        for worker, role in orders.start.items():
            if worker not in self._starting and worker not in orders.end:
                self._starting.add(worker)
                threading.Thread(target=self._start, args=(worker, role), daemon=True).start()
        if orders.engines != self._engines or time.monotonic() >= self._engines_due_s:
            all_reached = self._on_engines(orders.engines)
            self._engines = orders.engines
            self._engines_due_s = math.inf if all_reached else time.monotonic() + ENGINES_RETRY_S

    def _start(self, worker: str, role: Role) -> None:
        """Start one process; it may have to wait until the cluster has room."""
        try:
            (handle,) = self._spawner.spawn([self._plan.config_of(worker, role)])
            with self._lock:
                closed = self._stop.is_set()
                if not closed:
                    self._workers[worker] = handle
            if closed:
                self._spawner.end(worker)
            else:
                self._tell("provide", handle)
        except Llama4Error as error:
            self._tell("refuse", worker, error)
        except Exception:  # the controller must not wait for a process that cannot come
            log.exception("worker_not_started worker=%s", worker)
            self._tell("refuse", worker, UnavailableError(f"{worker} could not be started: see the driver's log"))
        finally:
            self._starting.discard(worker)

    def _tell(self, method: str, *arguments: object) -> None:
        """Let the controller of now know; without one, the next learns it when it takes over."""
        with self._lock:
            controller = self._controller
        if controller is not None:
            controller.call(method, *arguments)

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
