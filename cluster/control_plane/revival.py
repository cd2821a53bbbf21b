"""Starts attention workers and members of groups anew that are gone, each in a thread; it does not find out who is.

A new one follows the topology in use before it serves, and is told every later one. One of a group does not serve by
itself: that the group is formed again is `forming`'s.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cluster.worker import Role
from llama4_dist.errors import Llama4Error

if TYPE_CHECKING:
    from cluster.control_plane.controller import Controller

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 3600.0
FIRST_PAUSE_S = 1.0  # between tries that fail
LONGEST_PAUSE_S = 30.0


class Revival:
    """Which attention workers are on their way, and when to try again where that failed."""

    def __init__(self, controller: "Controller", clock: Callable[[], float]) -> None:
        self._controller = controller
        self._clock = clock
        self._lock = threading.Lock()
        self._on_their_way: set[str] = set()
        self._pauses_s: dict[str, float] = {}
        self._not_before_s: dict[str, float] = {}

    def revive(self, missing: Mapping[str, Role]) -> None:
        """Begin to start these; those on their way already are left alone."""
        if not self._controller.topology.epoch:
            return  # there is nothing that they could follow
        for worker, role in missing.items():
            with self._lock:
                if worker in self._on_their_way or self._clock() < self._not_before_s.get(worker, 0.0):
                    continue
                self._on_their_way.add(worker)
            threading.Thread(target=self._run, args=(worker, role), name=f"revive-{worker}", daemon=True).start()

    def _run(self, worker: str, role: Role) -> None:
        failed = True
        try:
            self._start(worker, role)
            failed = False
        except Exception as error:  # the next look at the workers tries again
            log.warning("worker_not_replaced worker=%s", worker, exc_info=not isinstance(error, Llama4Error))
            self._controller.members.remove([worker])
            self._controller.provisioning.dismiss([worker], timeout_s=0.0)
        finally:
            with self._lock:
                pause_s = self._pauses_s.get(worker, FIRST_PAUSE_S) if failed else 0.0
                self._pauses_s[worker] = min(LONGEST_PAUSE_S, 2 * pause_s) if failed else FIRST_PAUSE_S
                self._not_before_s[worker] = self._clock() + pause_s
                self._on_their_way.discard(worker)

    def _start(self, worker: str, role: Role) -> None:
        controller, members = self._controller, self._controller.members
        handles = controller.provisioning.obtain([worker], role, timeout_s=START_TIMEOUT_S, check=lambda: None)
        members.ask(handles, "load", deadline=time.monotonic() + LOAD_TIMEOUT_S)
        known = controller.topology
        members.ask(handles, "publish", known, deadline=time.monotonic() + START_TIMEOUT_S)
        members.add(handles)  # from here on it is told every topology
        if controller.topology is not known:  # one came between; whoever publishes it may not have known this worker
            members.try_each(handles, "publish", controller.topology, timeout_s=START_TIMEOUT_S)
        if role is Role.ATTENTION and not controller.leads(worker):
            members.ask(handles, "serve", deadline=time.monotonic() + START_TIMEOUT_S)  # the watch learns where
        log.info("worker_replaced worker=%s epoch=%d", worker, controller.topology.epoch)
