"""Looks after the workers: notices those that are gone and has them replaced. Serving never waits for it.

The reflex is the attention workers' own: rows went elsewhere long before this notices. It restores the copies.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.control_plane.autoscaling import Autoscaling
from cluster.control_plane.forming import Forming
from cluster.control_plane.revival import Revival
from cluster.handle import Handle
from cluster.operation import Phase
from cluster.reading import WorkerReading
from cluster.worker import Role, State, WorkerStatus
from llama4_dist.errors import ConflictError, Llama4Error, NotFoundError

if TYPE_CHECKING:
    from cluster.control_plane.controller import Controller

log = logging.getLogger(__name__)

INTERVAL_S = 0.5
LOADS_INTERVAL_S = 10.0
ANSWER_TIMEOUT_S = 2.0
SILENCE_S = 10.0  # a worker that answers nothing for so long is replaced; the old process is ended first
FIRST_PAUSE_S = 1.0  # between repairs that fail
LONGEST_PAUSE_S = 30.0
NO_ROOM = "INSUFFICIENT_CAPACITY"


class Watch:
    """A thread that asks every worker how it is, and begins repairs. Silence tells against who has answered once."""

    def __init__(self, controller: "Controller", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._controller = controller
        self._clock = clock
        self._heard_s: dict[Handle, float] = {}
        self._statuses: dict[str, WorkerStatus] = {}
        self.lost: Counter[tuple[Role, str]] = Counter()  # processes found gone
        self._revival = Revival(controller, clock)
        self._forming = Forming(controller, clock)
        policy = controller.autoscale
        self._autoscaling = Autoscaling(controller, policy, clock=clock) if policy is not None else None
        self._loads_noted_s = clock()
        self._last_repair = ""
        self._respawn = True  # False while replacements cannot be started: then those left take over
        self._pause_s = FIRST_PAUSE_S
        self._not_before_s = 0.0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch the workers there are: all of them have spoken."""
        self._heard_s = dict.fromkeys(self._controller.members.all, self._clock())
        self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            try:
                self.look()
            except Exception:  # a defect here must not end the watch
                log.exception("watch_failed")

    def readings(self) -> tuple[WorkerReading, ...]:
        """Say what every worker last said of itself, and how long ago."""
        heard_s, statuses, now_s = self._heard_s, self._statuses, self._clock()
        return tuple(
            WorkerReading(
                status=statuses.get(handle.worker)
                or WorkerStatus(worker=handle.worker, role=handle.role, state=State.NEW),
                heard_s_ago=now_s - heard_s[handle] if handle in heard_s else None,
            )
            for handle in self._controller.members.all
        )

    def look(self) -> None:
        """Ask everybody once, and act on who is gone."""
        controller = self._controller
        answers = self._ask(controller.members.all)
        controller.engines.set(
            {one.worker: one.addresses[0] for one in answers.values() if one.role is Role.ATTENTION and one.addresses}
        )
        self._revival.revive(controller.missing_attention)
        self._forming.look(answers)
        if controller.ledger.running:
            return
        controller.end_strangers(answers)
        self._catch_up(answers)
        missing = controller.missing_hosts
        if missing or not controller.is_complete:
            self._repair(missing)
        elif self._clock() - self._loads_noted_s >= LOADS_INTERVAL_S:
            self._loads_noted_s = self._clock()
            controller.note_loads()
        elif self._autoscaling is not None:
            self._autoscaling.look()

    def _ask(self, workers: Sequence[Handle]) -> Mapping[str, WorkerStatus]:
        """Return who answers; dismiss those that are dead, or silent for too long."""
        controller = self._controller
        answers, failures = controller.members.try_each(workers, "status", timeout_s=ANSWER_TIMEOUT_S)
        now_s = self._clock()
        gone = []
        heard_s: dict[Handle, float] = {}
        for worker in workers:
            error = failures.get(worker.worker)
            if error is None:
                heard_s[worker] = now_s
                continue
            since_s = self._heard_s.get(worker)  # None while its process starts
            if error.reason == "WORKER_LOST" or (since_s is not None and now_s - since_s >= SILENCE_S):
                log.warning("worker_gone worker=%s reason=%s", worker.worker, error.reason)
                gone.append(worker)
                self.lost[worker.role, worker.worker] += 1
            elif since_s is not None:
                heard_s[worker] = since_s
        self._heard_s = heard_s
        known = {one.worker for one in heard_s}
        self._statuses = {name: one for name, one in {**self._statuses, **answers}.items() if name in known}
        controller.dismiss(gone)
        return answers

    def _catch_up(self, answers: Mapping[str, WorkerStatus]) -> None:
        """Publish the topology once more to followers that work and failed to adopt it."""
        controller = self._controller
        topology = controller.topology
        behind = [
            worker
            for worker in controller.members.followers
            if (status := answers.get(worker.worker)) and status.addresses and status.epoch < topology.epoch
        ]
        _, failures = controller.members.try_each(behind, "publish", topology, timeout_s=ANSWER_TIMEOUT_S)
        for name, error in failures.items():
            log.warning("topology_not_adopted worker=%s epoch=%d cause=%s", name, topology.epoch, error)

    def _repair(self, missing: Sequence[str]) -> None:
        """Begin to restore copies: with new processes, or without where those could not be had last time."""
        self._learn()
        if self._clock() < self._not_before_s:
            return
        try:
            self._last_repair = self._controller.repair(missing, respawn=self._respawn).name
        except ConflictError:
            return  # an operator was faster; the next look finds out what is left to do
        except Llama4Error as error:
            log.error("repair_impossible missing=%s respawn=%s cause=%s", missing, self._respawn, error)
            self._respawn = True
            self._pause()

    def _learn(self) -> None:
        """Draw the conclusion from how the last repair ended."""
        try:
            last = self._controller.ledger.get(self._last_repair)
        except NotFoundError:  # none yet, or an operator deleted it
            return
        self._last_repair = ""
        if last.phase is Phase.DONE:
            self._respawn, self._pause_s = True, FIRST_PAUSE_S
        elif self._respawn and last.error_reason == NO_ROOM:
            self._respawn = False
        else:
            self._respawn = True
            self._pause()

    def _pause(self) -> None:
        self._not_before_s = self._clock() + self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
