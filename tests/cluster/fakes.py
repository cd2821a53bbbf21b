"""Workers that are plain objects in this process, and a spawner that runs the real controller over them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cluster.controller import CONTROLLER, ClusterPlan, Controller
from cluster.handle import Handle
from cluster.placement import ExpertGeometry, Pair
from cluster.worker import HostAddress, LoadProgress, Location, Role, State, Topology, WorkerConfig, WorkerStatus

GEOMETRY = ExpertGeometry(moe_layers=(0, 1), num_experts=4, expert_width=8, expert_bytes=10)


class FakeWorker:
    """A worker that remembers what it was asked."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.pairs: Sequence[Pair] = ()
        self.loaded = False
        self.topology: Topology | None = None

    def location(self) -> Location:
        return Location(node="node-" + self.config.worker[-1], address="127.0.0.1")

    def load(self, pairs: Sequence[Pair] = ()) -> HostAddress:
        self.pairs, self.loaded = pairs, True
        worker = self.config.worker
        return HostAddress(host=worker, incarnation=7, node="n", unix=f"unix:/{worker}", tcp="tcp:127.0.0.1:1")

    def publish(self, topology: Topology) -> int:
        self.topology = topology
        return topology.epoch

    def serve(self) -> str:
        return f"address of {self.config.worker}"

    def progress(self) -> LoadProgress:
        state = State.READY if self.loaded else State.LOADING
        return LoadProgress(
            worker=self.config.worker, role=self.config.role, state=state, done=1 + self.loaded, total=2
        )

    def status(self) -> WorkerStatus:
        return WorkerStatus(worker=self.config.worker, role=self.config.role, state=State.READY)

    def close(self) -> None:
        pass


class FakeHandle:
    """Runs each call in a thread of its own."""

    def __init__(self, worker: str, role: Role, target: Any, spawner: "FakeSpawner") -> None:
        self.worker, self.role, self.target, self.spawner = worker, role, target, spawner

    def call(self, method: str, *arguments: object) -> Future[Any]:
        answer: Future[Any] = Future()

        def run() -> None:
            self.spawner.calls.append((self.worker, method))
            try:
                action = self.spawner.faults.get(f"{self.worker}.{method}")
                answer.set_result(action() if action else getattr(self.target, method)(*arguments))
            except Exception as error:  # noqa: BLE001 - carried to the caller
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return answer

    def kill(self) -> None:
        self.spawner.calls.append((self.worker, "kill"))


class FakeSpawner:
    """`faults` maps worker__method to what happens instead."""

    def __init__(self, **faults: Callable[[], Any]) -> None:
        self.faults = {name.replace("__", ".").replace("_", "-"): action for name, action in faults.items()}
        self.calls: list[tuple[str, str]] = []
        self.workers: dict[str, FakeWorker] = {}
        self.closed = 0

    def spawn(self, configs: Sequence[WorkerConfig]) -> list[FakeHandle]:
        for config in configs:
            self.workers[config.worker] = FakeWorker(config)
        return [FakeHandle(c.worker, c.role, self.workers[c.worker], self) for c in configs]

    def spawn_controller(self, plan: ClusterPlan, workers: Sequence[Handle]) -> FakeHandle:
        controller = Controller(plan, list(workers), Location(node="node-c", address="127.0.0.1"))
        return FakeHandle(CONTROLLER, Role.CONTROLLER, controller, self)

    def close(self) -> None:
        self.closed += 1


def configs(role: Role, count: int) -> tuple[WorkerConfig, ...]:
    return tuple(
        WorkerConfig(
            worker=f"{role}-{i}", role=role, model_dir=Path("m"), dtype="auto", device="cpu", num_threads=1,
            run_dir=Path("r"), secret=b"s" * 32,
        )
        for i in range(count)
    )  # fmt: skip


def plan(num_experts: int = 2, num_attention: int = 1, **options: Any) -> ClusterPlan:
    experts, attention = configs(Role.EXPERT, num_experts), configs(Role.ATTENTION, num_attention)
    return ClusterPlan(geometry=GEOMETRY, experts=experts, attention=attention, **options)


def fail(error: Exception) -> Callable[[], Any]:
    def action() -> Any:
        raise error

    return action
