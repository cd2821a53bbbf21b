"""Lets the load change the number of expert hosts: reads it, asks `autoscale.decide`, and begins to scale like anybody.

Off unless the plan has a policy. What it may not do just now, because an operator or a repair is at work, it leaves.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cluster.operation import ChangeOptions, HostLoad
from cluster.planning.autoscale import AutoscalePolicy, Pressure, Reading, decide
from cluster.worker import Role
from llama4_dist.errors import Llama4Error

if TYPE_CHECKING:
    from cluster.control_plane.controller import Controller

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
ANSWER_TIMEOUT_S = 2.0


class Autoscaling:
    """Remembers the last readings and the pressure. Not thread-safe: the watch calls it."""

    def __init__(
        self, controller: "Controller", policy: AutoscalePolicy, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._controller = controller
        self._policy = policy
        self._clock = clock
        self._pressure = Pressure()
        self._last: Mapping[str, HostLoad] = {}
        self._next_s = 0.0

    def look(self) -> None:
        """Read the load, if it is time, and begin to scale where that is called for."""
        if self._clock() < self._next_s:
            return
        self._next_s = self._clock() + INTERVAL_S
        loads = {load.host: load for load in self._controller.loads()}
        busy, self._last = busy_share(self._last, loads), loads
        num_hosts = len(self._controller.topology.hosts)
        if busy is None or len(loads) < num_hosts:
            return  # hosts come and go: what they do now says nothing of what they will
        reading = Reading(at_s=self._clock(), num_hosts=num_hosts, busy=busy, queue_age_s=self._queue_age_s())
        self._pressure, target = decide(self._policy, self._pressure, reading)
        if target == num_hosts:
            return
        log.info(
            "autoscale hosts=%d target=%d busy=%.2f queue_age_s=%.2f", num_hosts, target, busy, reading.queue_age_s
        )
        try:
            self._controller.scale(target, ChangeOptions())
        except Llama4Error as error:
            log.warning("autoscale_refused target=%d cause=%s", target, error)

    def _queue_age_s(self) -> float:
        members = self._controller.members
        answers, _ = members.try_each(members.of(Role.ATTENTION), "queue_age_s", timeout_s=ANSWER_TIMEOUT_S)
        return max(answers.values(), default=0.0)


def busy_share(before: Mapping[str, HostLoad], now: Mapping[str, HostLoad]) -> float | None:
    """Return the share of time that hosts computed between two readings, mean over those that lived through it."""
    shares = [
        (load.compute_s - then.compute_s) / (load.at_s - then.at_s)
        for host, load in now.items()
        if (then := before.get(host)) and then.incarnation == load.incarnation and load.at_s > then.at_s
    ]
    return min(1.0, sum(shares) / len(shares)) if shares else None
