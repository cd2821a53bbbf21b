"""A spawner of fake workers that runs the real controller over them, and ends processes and controllers at will."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cluster.control_plane.controller import Controller
from cluster.handle import Handle
from cluster.plan import ClusterPlan, stages_of
from cluster.standing import CONTROLLER
from cluster.worker import Location, Role, WorkerConfig
from llama4_dist.errors import UnavailableError
from llama4_dist.partition import WHOLE, Partition
from tests.cluster.fake_workers import GEOMETRY, FakeAttention, FakeHost, FakeWorker


class FakeHandle:
    """Runs each call in a thread of its own. `life` is that of the controller that holds it; None = the driver."""

    def __init__(self, target: Any, spawner: "FakeSpawner", life: "Life | None" = None) -> None:
        self.worker: str = CONTROLLER if isinstance(target, Controller) else target.name
        self.role = Role.CONTROLLER if isinstance(target, Controller) else target.config.role
        self.target, self.spawner, self.life = target, spawner, life

    def call(self, method: str, *arguments: object) -> Future[Any]:
        answer: Future[Any] = Future()
        if self.life is not None:
            self.life.pass_boundary(self.worker, method)

        def run() -> None:
            spawner = self.spawner
            spawner.calls.append((self.worker, method))
            try:
                spawner.check_alive(self)
                action = spawner.faults.get(f"{self.worker}.{method}")
                if action is not None:
                    action()
                spawner.check_alive(self)
                name = "call_topology" if method == "topology" else method
                given = [one.for_controller(self) if isinstance(one, FakeHandle) else one for one in arguments]
                answer.set_result(getattr(self.target, name)(*given))
            except SystemExit:
                answer.set_exception(UnavailableError(f"the process of {self.worker} died", reason="WORKER_LOST"))
            except Exception as error:  # noqa: BLE001 - carried to the caller
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return answer

    def for_controller(self, controller: "FakeHandle") -> "FakeHandle":
        """Return the copy that a controller gets: it is of no use to it once it is dead."""
        return FakeHandle(self.target, self.spawner, self.spawner.life_of(controller.target))

    def kill(self) -> None:
        self.spawner.calls.append((self.worker, "kill"))
        self.spawner.kill(self)


class Life:
    """A controller's: ends before or after its `dies_at`-th call of a worker, or when it is killed."""

    def __init__(self) -> None:
        self.over = False
        self.num_calls = 0
        self.made: list[str] = []
        self.dies_at: int | None = None
        self.lock = threading.Lock()

    def pass_boundary(self, worker: str, method: str) -> None:
        if method in ("status", "load_now", "reading"):  # the watch's, at no fixed time
            if self.over:
                raise SystemExit
            return
        with self.lock:
            self.over = self.over or self.num_calls == self.dies_at
            self.num_calls += 1
            if self.over:
                raise SystemExit  # ends the thread, as a process that dies ends all of its threads
            self.made.append(f"{worker}.{method}")


class FakeSpawner:
    """`faults` maps worker__method to what happens before it (an exception: instead)."""

    def __init__(self, **faults: Callable[[], Any]) -> None:
        self.faults = {name.replace("__", ".").replace("_", "-"): action for name, action in faults.items()}
        self.calls: list[tuple[str, str]] = []
        self.workers: dict[str, FakeWorker] = {}
        self.handles: dict[str, FakeHandle] = {}
        self.dead: set[str] = set()
        self.ended: list[str] = []
        self.breaches: list[str] = []
        self.spawn_fault: Callable[[str], object] = lambda worker: None
        self.controllers: list[tuple[Controller, Life]] = []
        self.next_life: Callable[[Life], object] = lambda life: None
        self.closed = 0
        self.num_nodes = 1
        self.machines: dict[str, str] = {}  # where nodes are pods: the machine of a worker's

    def spawn(self, configs: Sequence[WorkerConfig]) -> list[FakeHandle]:
        for config in configs:
            self.spawn_fault(config.worker)
            kind = FakeHost if config.role is Role.EXPERT else FakeAttention
            old = self.workers.get(config.worker)
            self.note(old is None or config.worker in self.dead, f"{config.worker} was started twice")
            self.dead.discard(config.worker)
            self.workers[config.worker] = kind(config, self)
            self.handles[config.worker] = FakeHandle(self.workers[config.worker], self)
        return [self.handles[config.worker] for config in configs]

    def spawn_controller(self, plan: ClusterPlan, workers: Sequence[Handle]) -> FakeHandle:
        life = Life()
        self.next_life(life)
        mine = [FakeHandle(handle.target, self, life) for handle in workers]  # type: ignore[attr-defined]
        controller = Controller(plan, mine, Location(node="node-c", address="127.0.0.1"))
        self.controllers.append((controller, life))
        return FakeHandle(controller, self)

    def end(self, worker: str) -> None:
        self.ended.append(worker)
        if worker in self.handles:
            self.handles.pop(worker).kill()

    def answers(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.closed += 1

    def kill(self, handle: FakeHandle) -> None:
        """End a process; its last calls fail."""
        if handle.worker == CONTROLLER:
            self.life_of(handle.target).over = True
        elif self.workers[handle.worker] is handle.target:
            self.dead.add(handle.worker)

    def die(self, worker: str) -> None:
        """Let a process die by itself."""
        if worker == CONTROLLER:
            self.controllers[-1][1].over = True
        else:
            self.dead.add(worker)

    @property
    def controller(self) -> Controller:
        return self.controllers[-1][0]

    @property
    def newest_epoch(self) -> int:
        return self.controller.topology.epoch

    def life_of(self, controller: Controller) -> Life:
        return next(life for one, life in self.controllers if one is controller)

    def check_alive(self, handle: FakeHandle) -> None:
        if handle.worker == CONTROLLER:
            gone = self.life_of(handle.target).over
        else:
            gone = handle.worker in self.dead or self.workers[handle.worker] is not handle.target
        if gone:
            raise UnavailableError(f"the process of {handle.worker} died", reason="WORKER_LOST")

    def node_of(self, worker: str) -> str:
        return f"node-{int(worker.rpartition('-')[2]) % self.num_nodes}"

    def machine_of(self, worker: str) -> str:
        return self.machines.get(worker, "")

    def note(self, kept: bool, breach: str) -> None:
        if not kept:
            self.breaches.append(breach)

    def hosts(self) -> dict[str, FakeHost]:
        """Expert hosts whose processes live."""
        return {
            name: host for name, host in self.workers.items() if isinstance(host, FakeHost) and name not in self.dead
        }

    def serving(self) -> list[FakeAttention]:
        """Attention workers that serve."""
        return [
            worker
            for name, worker in self.workers.items()
            if isinstance(worker, FakeAttention) and worker.topology_in_use is not None and name not in self.dead
        ]


def configs(role: Role, count: int, partition: Partition = WHOLE) -> tuple[WorkerConfig, ...]:
    return tuple(
        WorkerConfig(
            worker=f"{role}-{i}", role=role, model_dir=Path("m"), dtype="auto", device="cpu", num_threads=1,
            run_dir=Path("r"), secret=b"s" * 32, partition=partition,
        )
        for i in range(count)
    )  # fmt: skip


def plan(num_experts: int = 2, num_attention: int = 1, *, partition: Partition = WHOLE, **options: Any) -> ClusterPlan:
    experts, attention = configs(Role.EXPERT, num_experts), configs(Role.ATTENTION, num_attention, partition)
    stages = tuple(stage for leader in attention for stage in stages_of(leader, num_threads=1))
    return ClusterPlan(model="m", geometry=GEOMETRY, experts=experts, attention=attention, stages=stages, **options)


def fail(error: Exception) -> Callable[[], Any]:
    def action() -> Any:
        raise error

    return action
