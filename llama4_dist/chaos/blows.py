"""Carries the steps of a chaos schedule out on a running cluster, and records each with its proof."""

import logging
import random
import threading
import time
from collections.abc import Sequence

from llama4_dist.chaos.faults import Fault, FaultNotVerified, Kill, Stop
from llama4_dist.chaos.history import EventKind, History
from llama4_dist.chaos.schedule import Action, Step
from llama4_dist.chaos.serving import Gateway
from llama4_dist.client.admin import AdminClient
from llama4_dist.client.admin_results import Worker
from llama4_dist.errors import Llama4Error

log = logging.getLogger(__name__)

RECOVERY_TIMEOUT_S = 120.0
POLL_S = 0.2
VICTIMS = {
    Action.KILL_EXPERT: "expert",
    Action.STOP_EXPERT: "expert",
    Action.KILL_ATTENTION: "attention",
    Action.KILL_STAGE: "stage",
    Action.KILL_CONTROLLER: "controller",
}


class Blows:
    """Strikes a cluster that `admin` speaks for. Each blow is watched by a thread until the cluster is whole again."""

    def __init__(self, admin: AdminClient, history: History, gateways: Sequence[Gateway] = ()) -> None:
        self._admin = admin
        self._gateways = gateways
        self._history = history
        self._watchers: list[threading.Thread] = []
        self.num_struck = 0
        self.num_skipped = 0  # nobody there to strike

    def run(self, schedule: Sequence[Step], stop: threading.Event) -> None:
        """Do every step at its time, and return when all have been seen through."""
        begun_s = time.monotonic()
        for step in schedule:
            if stop.wait(max(0.0, begun_s + step.at_s - time.monotonic())):
                break
            deeds = {Action.SCALE: self._scale, Action.KILL_GATEWAY: self._kill_gateway}
            deeds.get(step.action, self._strike)(step)
        for watcher in self._watchers:
            watcher.join(RECOVERY_TIMEOUT_S)

    def _strike(self, step: Step) -> None:
        try:
            cluster = self._admin.status()
        except Llama4Error as error:
            log.info("blow_skipped action=%s cause=%s", step.action, error)
            self.num_skipped += 1
            return
        victims = [one for one in cluster.workers if one.role == VICTIMS[step.action] and one.state == "ready"]
        if not victims:
            self.num_skipped += 1
            return
        victim = victims[int(step.draw * len(victims))]
        phase = self._phase(cluster.operation)
        fault: Fault = Stop(victim.pid) if step.action is Action.STOP_EXPERT else Kill(victim.pid)
        extra = {
            "number": self._history.next_number(),
            "name": str(step.action),
            "phase": phase,
            "worker": victim.worker,
        }
        self._history.record(EventKind.FAULT_INJECTED, extra=extra)
        try:
            fault.inject()
            fault.verify()
        except (FaultNotVerified, ValueError) as error:
            log.warning("blow_failed action=%s cause=%s", step.action, error)
            fault.heal()
            return
        self._history.record(EventKind.FAULT_VERIFIED, extra=extra)
        self.num_struck += 1
        hold_s = step.amount if step.action is Action.STOP_EXPERT else 0.0
        watcher = threading.Thread(target=self._see_through, args=(fault, victim, extra, hold_s), daemon=True)
        watcher.start()
        self._watchers.append(watcher)

    def _kill_gateway(self, step: Step) -> None:
        """Kill a gateway that is a process of its own, and start it again."""
        if not self._gateways:
            self.num_skipped += 1
            return
        gateway = self._gateways[int(step.draw * len(self._gateways))]
        with self._history.fault(Kill(gateway.pid), name=str(step.action), phase="serving"):
            self.num_struck += 1
            gateway.restart()

    def _see_through(self, fault: Fault, victim: Worker, extra: dict[str, object], hold_s: float) -> None:
        """Heal what can be healed, and note when the cluster is whole again."""
        time.sleep(hold_s)
        fault.heal()
        deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
        while time.monotonic() < deadline_s and not self._is_whole(victim, killed=isinstance(fault, Kill)):
            time.sleep(POLL_S)
        self._history.record(EventKind.FAULT_HEALED, extra=extra)

    def _is_whole(self, victim: Worker, *, killed: bool) -> bool:
        """Tell whether the victim answers again, was replaced, or is not wanted any more."""
        try:
            cluster = self._admin.status()
        except Llama4Error:
            return False
        now = [one for one in cluster.workers if one.worker == victim.worker]
        if not now:
            return True  # scaled away
        is_formed = not now[0].group or now[0].formation > 0
        return now[0].state == "ready" and is_formed and (not killed or now[0].pid != victim.pid)

    def _phase(self, operation: str) -> str:
        """Say what the cluster is doing."""
        if not operation:
            return "serving"
        try:
            found = self._admin.operation(operation)
        except Llama4Error:
            return "serving"
        return f"{found.kind}:{found.phase}"

    def _scale(self, step: Step) -> None:
        watcher = threading.Thread(target=self._scale_to, args=(int(step.amount),), daemon=True)
        watcher.start()
        self._watchers.append(watcher)

    def _scale_to(self, num_hosts: int) -> None:
        """Scale, waiting for a change under way to end first, as an operator would."""
        draw, deadline_s = random.Random(num_hosts), time.monotonic() + RECOVERY_TIMEOUT_S  # noqa: S311 - no secret
        extra = {"number": self._history.next_number(), "name": f"scale to {num_hosts}"}
        while time.monotonic() < deadline_s:
            try:
                operation = self._admin.scale(num_hosts)
                break
            except Llama4Error as error:
                log.info("scale_waits cause=%s", error)
                time.sleep(draw.uniform(0.2, 0.6))
        else:
            self.num_skipped += 1
            return
        self._history.record(EventKind.OPERATION_STARTED, extra=extra)
        try:
            ended = self._admin.wait(operation.name, timeout_s=RECOVERY_TIMEOUT_S)
            extra |= {"phase": str(ended.phase), "error": ended.error_message, "paused_s": ended.paused_s}
        except Llama4Error as error:  # its controller was killed: what it began, another one puts in order
            extra |= {"error": str(error)}
        self._history.record(EventKind.OPERATION_ENDED, extra=extra)
