"""The driver's half of a simulated cluster: owns processes, carries orders out, replaces controllers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cluster.control_plane.controller import Controller
from cluster.worker import Location, Role
from llama4_dist.errors import UnavailableError
from tests.simulation.attention_process import SimAttention
from tests.simulation.expert_process import SimHost
from tests.simulation.wire import ControllerDied, Handle, Life

if TYPE_CHECKING:
    from tests.simulation.world import World

START_TIMEOUT_S = 60.0


class Driver:
    """Owns processes as `cluster.driver.processes.ClusterProcesses` does; it never dies."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.processes: dict[str, SimHost | SimAttention] = {}
        self.every_host: list[SimHost] = []
        self.life = Life(over=True)
        self.controller: Controller | None = None
        self._replace_s = 0.0
        self._starting: dict[str, tuple[float, Role]] = {}

    def start(self) -> None:
        """Bring a cluster up."""
        plan = self._world.cluster_plan
        for config in (*plan.experts, *plan.attention):
            self._spawn(config.worker, config.role)
        self.controller = self._new_controller(self.processes.values())
        self.controller.start(START_TIMEOUT_S)

    def lose_controller(self) -> None:
        """Kill the controller; another one follows."""
        world = self._world
        self.life.over = True
        self.controller = None
        self._replace_s = world.clock.now + world.random.choice((0.0, 0.5, 3.0))
        world.note("controller dies")
        world.wire.controller_died()

    def serve(self) -> None:
        """Do what is due: start and end processes, tell the controller."""
        world, controller = self._world, self.controller
        for worker, (due_s, role) in tuple(self._starting.items()):
            if world.clock.now >= due_s:
                del self._starting[worker]
                self._come_up(worker, role)
        if controller is None:
            return
        orders = controller.orders()
        for worker in orders.end:
            process = self.processes.pop(worker, None)
            if process is not None and process.alive:
                world.note(f"driver ends {worker}")
                world.judge.note(process.role is Role.EXPERT, f"{worker} was dismissed, which never died")
                process.kill()
            controller.ended(worker)
        for worker, role in orders.start.items():
            if worker not in self._starting and worker not in orders.end:
                self._starting[worker] = (world.clock.now + world.random.choice((0.0, 0.3, 2.0)), role)

    def replace_controller(self) -> None:
        """Start another controller, if there is none and it is time; it asks the workers."""
        world = self._world
        if self.controller is not None or world.clock.now < self._replace_s:
            return
        known = list(self.processes.values())
        controller = self.controller = self._new_controller(known)
        world.note("controller recovers")
        try:
            world.control("recover", controller.recover)
        except ControllerDied:
            return
        if self.controller is controller:
            for process in self.processes.values():
                if process not in known:
                    controller.provide(Handle(process, world, self.life))

    def _new_controller(self, processes: Iterable[SimHost | SimAttention]) -> Controller:
        world = self._world
        world.clock.advance(0.001)  # incarnations are milliseconds
        life = self.life = Life()
        handles = [Handle(process, world, life) for process in processes]
        return Controller(world.cluster_plan, handles, Location(node="node-0", address="simulated"))

    def _come_up(self, worker: str, role: Role) -> None:
        world, controller = self._world, self.controller
        if world.refuses_processes():
            if controller is not None:
                controller.refuse(worker, UnavailableError(f"no room for {worker}", reason="INSUFFICIENT_CAPACITY"))
            return
        process = self._spawn(worker, role)
        if controller is not None:
            controller.provide(Handle(process, world, self.life))

    def _spawn(self, worker: str, role: Role) -> SimHost | SimAttention:
        world = self._world
        world.clock.advance(0.001)  # incarnations are milliseconds
        old = self.processes.get(worker)
        world.judge.note(old is None or not old.alive, f"{worker} is started twice")
        config = world.cluster_plan.config_of(worker, role)
        process: SimHost | SimAttention
        if role is Role.ATTENTION:
            process = SimAttention(config, world)
        else:
            process = SimHost(config, world, node=f"node-{int(worker.rpartition('-')[2]) % 2}")
            self.every_host.append(process)
        self.processes[worker] = process
        world.note(f"{worker} starts as {process.incarnation}")
        return process
