"""A whole cluster in one thread by one clock: what passes when time passes, and what may strike at each moment.

The engine, the dispatcher, the hosts' servers and the controller are the real ones.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from llama4_dist.dispatch.links.inproc import Faults
from llama4_dist.errors import Llama4Error
from tests.simulation import strikes
from tests.simulation.attention_process import SimAttention
from tests.simulation.clock import Clock
from tests.simulation.cluster_plan import cluster_plan
from tests.simulation.driver import Driver
from tests.simulation.expert_process import SimHost
from tests.simulation.judge import Judge
from tests.simulation.plan import Plan
from tests.simulation.wire import QUIET, ControllerDied, Handle, Life, Wire

LOOK_S, SERVE_S, REDIAL_S = 0.5, 0.1, 0.05


class World:
    """Everything there is. `point` and `at_call` are the moments, `pass_time` is what goes on beside."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = plan
        self.random = random.Random(seed + 1_000_000)
        self.clock = Clock(self._in_step)
        self.trace: list[str] = []
        self.kills: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        self.judge = Judge(self)
        self.wire = Wire(self)
        self.cluster_plan = cluster_plan(plan)
        self.driver = Driver(self)
        self.blows = [replace(blow) for blow in plan.blows]  # they count down
        self.stepping: SimAttention | None = None
        self.beginning = 0  # while a look or a request of the operator is under way, no other one begins
        self.armed = False  # the cluster is up, and faults may strike
        self.calm = False  # faults have ceased
        self.judging = True  # whether the tokens of requests submitted now have to be right
        self.resumes: list[tuple[float, SimHost]] = []
        self._frames: list[Life] = []  # of what the controller does just now, the innermost last
        self._queued: list[tuple[str, Callable[[], None], Life]] = []
        self._next_s: Counter[str] = Counter()
        self._num_requests = 0

    # --- who is there

    @property
    def hosts(self) -> dict[str, SimHost]:
        """Expert hosts that the driver knows, dead ones too."""
        return {name: one for name, one in self.driver.processes.items() if isinstance(one, SimHost)}

    @property
    def living(self) -> list[SimHost]:
        return [host for host in self.hosts.values() if host.alive and host.address() is not None]

    @property
    def attention(self) -> list[SimAttention]:
        """Attention workers that serve."""
        return [one for one in self.driver.processes.values() if isinstance(one, SimAttention) and one.epoch]

    def host_called(self, name: str) -> SimHost | None:
        process = self.driver.processes.get(name)
        return process if isinstance(process, SimHost) else None

    def barred(self, worker: SimAttention) -> set[str]:
        """Hosts that a worker does not dial again."""
        return {host for host, _ in worker._follower.links._barred}

    @property
    def is_idle(self) -> bool:
        """Whether no step and no change is under way."""
        return self.stepping is None and not self._frames

    @property
    def has_queued(self) -> bool:
        return bool(self._queued)

    def link_faults(self, host: SimHost) -> tuple[Faults | None, Faults | None]:
        """Draw the faults of a new link, to the host and back."""
        if self.plan.links == "clean" or self.calm:
            return None, None
        drop = 0.04 if self.plan.links == "lossy" and self.random.random() < 0.5 else 0.0
        to_host, to_worker = (
            Faults(seed=self.random.getrandbits(30), drop=drop, duplicate=0.2, reorder=0.3, delay=0.3, delay_s=0.01)
            for _ in range(2)
        )
        return to_host, to_worker

    def refuses_processes(self) -> bool:
        return not self.calm and self.random.random() < self.plan.refusing

    def note(self, event: str) -> None:
        self.trace.append(f"{self.clock.now - 1000.0:9.3f} {event}")

    # --- moments

    def point(self, name: str, process: SimHost | SimAttention) -> None:
        """Pass a moment: what was planned for it happens."""
        self.passed[name] += 1
        for blow in self.blows if self.armed else ():
            if blow.point == name and blow.left > 0:
                blow.left -= 1
                if blow.left == 0:
                    self.note(f"at {name} of {process.name}: {blow.action}")
                    strikes.strike(self, blow.action, process, name)
        if self.stepping is not None:
            self.wire.deliver()

    def at_call(self, handle: Handle, method: str) -> None:
        """Pass the moment before a call of the controller, at which anything may happen, its death too."""
        self._check_life(handle.life)
        self.point(f"call:{method}", handle.process)
        if self.armed and method not in QUIET and self.random.random() < self.plan.nesting:
            strikes.meanwhile(self)
        self._check_life(handle.life)

    def _in_step(self) -> None:
        """While a step waits, hosts go on and hear what they are told."""
        self._resume()
        self.wire.deliver()
        if self.blows and (hosts := self.living):
            self.point("waiting", hosts[self.passed["waiting"] % len(hosts)])

    # --- time

    def pass_time(self, seconds: float) -> None:
        """Let time pass: calls arrive, stopped hosts go on, links are dialled, processes come up, the watch looks."""
        self.clock.advance(seconds)
        self.clock.wake()
        self._resume()
        self.wire.deliver()
        if self._due("redial", REDIAL_S):
            for worker in self.attention:
                worker.redial()
        if self._due("serve", SERVE_S):
            self.driver.serve()
        if self.is_idle:
            self.driver.replace_controller()
        if self.stepping is None and not self.beginning and self._due("look", LOOK_S):
            self.look()
        if self._frames:
            if self.stepping is None and self.random.random() < 0.3:
                self.step_all()
            self._check_life(self._frames[-1])
        self.run_queued()

    def step_all(self) -> None:
        """Let every engine with work do a step."""
        for worker in self.attention:
            if worker.core.has_work:
                self.step(worker)

    def step(self, worker: SimAttention) -> None:
        """Do one step and judge it."""
        begun_s, table, steady = self.clock.now, worker.dispatcher.table, self.judge.steady_hosts(worker)
        self.stepping = worker
        try:
            outputs = worker.step()
        finally:
            self.stepping = None
        if outputs:
            said = [(one.request_id, one.token_ids or one.error or one.finish_reason) for one in outputs]
            self.note(f"{worker.name} says {said}")
        self.judge.on_outputs(worker, outputs)
        self.judge.on_step(worker, table, steady, begun_s)

    def _due(self, what: str, every_s: float) -> bool:
        if self.clock.now < self._next_s[what]:
            return False
        self._next_s[what] = self.clock.now + every_s  # type: ignore[assignment]
        return True

    def _resume(self) -> None:
        for due_s, host in tuple(self.resumes):
            if self.clock.now >= due_s:
                self.resumes.remove((due_s, host))
                if host.alive:
                    self.note(f"{host.name} goes on")
                    host.go_on()

    # --- control

    def begin_thread(self, name: str, run: Callable[[], None]) -> None:
        self._queued.append((name, run, self.driver.life))

    def run_queued(self) -> None:
        """Run what the controller began beside its answers, as long as it lives."""
        while self._queued and self.is_idle and not self.beginning:
            name, run, life = self._queued.pop(0)
            if not life.over:
                self.note(f"{name} begins")
                self.control(name, run)
                self._note_end(name)

    def _note_end(self, name: str) -> None:
        controller = self.driver.controller
        for operation in controller.operations() if controller is not None else ():
            if operation.name == name:
                self.note(f"{name} is {operation.phase} {operation.error_message}{' '.join(operation.warnings)}")
                self.judge.on_operation_end(operation)

    def control(self, what: str, run: Callable[[], object]) -> None:
        """Run something of the controller's, to its end or to that of the controller."""
        self._frames.append(self.driver.life)
        try:
            run()
        except ControllerDied:
            self.note(f"{what} is cut off")
        finally:
            self._frames.pop()

    def look(self) -> None:
        """Let the watch look once."""
        controller = self.driver.controller
        if controller is not None:
            self.operate("look", controller._watch.look, refusals=False)

    def operate(self, what: str, run: Callable[[], object], *, refusals: bool = True) -> None:
        """Ask the controller for something; it may refuse, but not break."""
        self.beginning += 1
        try:
            self.control(what, run)
        except Llama4Error as error:
            self.note(f"{what} is refused: {error}")
            self.judge.note(refusals, f"{what} broke: {error!r}")
        except Exception as error:  # noqa: BLE001 - a defect is a finding
            self.judge.note(False, f"{what} broke: {error!r}")
        finally:
            self.beginning -= 1

    def _check_life(self, life: Life) -> None:
        if life.over:
            raise ControllerDied
