"""The controller over workers that are plain objects in this process."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from cluster.controller import ClusterPlan, Controller
from cluster.placement import ExpertGeometry, Pair
from cluster.worker import HostAddress, LoadProgress, Location, Role, State, Topology, WorkerConfig, WorkerStatus
from llama4_dist.errors import CheckpointError, ConfigError, UnavailableError

GEOMETRY = ExpertGeometry(moe_layers=(0, 1), num_experts=4, expert_width=8, expert_bytes=10)


class FakeWorker:
    """A worker that remembers what it was asked. `faults` maps a method to what happens instead."""

    def __init__(
        self, config: WorkerConfig, calls: list[tuple[str, str]], faults: dict[str, Callable[[], Any]]
    ) -> None:
        self.config, self.calls, self.faults = config, calls, faults
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

    def __init__(self, target: FakeWorker) -> None:
        self.worker, self.role, self.target = target.config.worker, target.config.role, target

    def call(self, method: str, *arguments: object) -> Future[Any]:
        answer: Future[Any] = Future()

        def run() -> None:
            self.target.calls.append((self.worker, method))
            try:
                action = self.target.faults.get(f"{self.worker}.{method}")
                answer.set_result(action() if action else getattr(self.target, method)(*arguments))
            except Exception as error:  # noqa: BLE001 - carried to the caller
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return answer

    def kill(self) -> None:
        self.target.calls.append((self.worker, "kill"))


class FakeSpawner:
    def __init__(self, **faults: Callable[[], Any]) -> None:
        self.faults = {name.replace("__", ".").replace("_", "-"): action for name, action in faults.items()}
        self.calls: list[tuple[str, str]] = []
        self.workers: dict[str, FakeWorker] = {}
        self.closed = 0

    def spawn(self, configs: Sequence[WorkerConfig]) -> list[FakeHandle]:
        for config in configs:
            self.workers[config.worker] = FakeWorker(config, self.calls, self.faults)
        return [FakeHandle(self.workers[config.worker]) for config in configs]

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


def test_every_attention_worker_gets_the_topology_of_what_the_hosts_hold() -> None:
    spawner, events = FakeSpawner(), []
    controller = Controller(plan(num_attention=2), spawner, progress=events.append)
    controller.start(timeout_s=5)
    assert controller.engine_addresses == ("address of attention-0", "address of attention-1")
    for name in ("attention-0", "attention-1"):
        topology = spawner.workers[name].topology
        assert topology is not None
        assert topology.epoch == 1
        assert topology.hosts.keys() == {"expert-0", "expert-1"}
        for host in topology.hosts:
            assert topology.placement.held_by(host) == spawner.workers[host].pairs
    states = {(event.worker, event.state) for event in events}
    assert {(name, state) for name in spawner.workers for state in (State.NEW, State.READY)} <= states


def test_a_slow_load_is_reported_while_it_lasts() -> None:
    release = threading.Event()
    spawner, events = FakeSpawner(expert_1__load=lambda: release.wait(5) and None), []
    timer = threading.Timer(0.6, release.set)
    timer.start()
    Controller(plan(), spawner, progress=events.append).start(timeout_s=5)
    loading = [event for event in events if event.state is State.LOADING]
    assert {event.worker for event in loading} == {"expert-1"}
    assert (loading[0].done, loading[0].total) == (1, 2)


@pytest.mark.parametrize("method", ["location", "load"])
def test_a_worker_that_dies_at_start_ends_the_start_at_once_and_leaves_nothing(method: str) -> None:
    never = threading.Event()
    died = fail(UnavailableError("the process of expert worker expert-1 died", reason="WORKER_LOST"))
    spawner = FakeSpawner(**{f"expert_1__{method}": died, f"attention_0__{method}": lambda: never.wait(20)})
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="expert-1 died"):
        Controller(plan(), spawner).start(timeout_s=60)
    assert time.monotonic() - started < 10
    assert {worker for worker, call in spawner.calls if call == "kill"} == spawner.workers.keys()
    assert spawner.closed == 1
    never.set()


def test_the_workers_own_error_reaches_the_caller() -> None:
    spawner = FakeSpawner(expert_0__load=fail(CheckpointError("shard is damaged", file="a.safetensors")))
    with pytest.raises(CheckpointError, match="shard is damaged"):
        Controller(plan(), spawner).start(timeout_s=5)


def test_a_worker_that_hangs_is_named_when_time_is_up() -> None:
    never = threading.Event()
    spawner = FakeSpawner(attention_0__publish=lambda: never.wait(20))
    with pytest.raises(UnavailableError, match="attention-0 did not publish in time"):
        Controller(plan(), spawner).start(timeout_s=0.5)
    assert spawner.closed == 1
    never.set()


def test_a_worker_that_does_not_answer_is_reported_as_lost() -> None:
    spawner = FakeSpawner(expert_0__status=fail(UnavailableError("died")))
    controller = Controller(plan(), spawner)
    controller.start(timeout_s=5)
    assert {status.worker: status.state for status in controller.status()} == {
        "expert-0": State.LOST,
        "expert-1": State.READY,
        "attention-0": State.READY,
    }


def test_closing_stops_attention_before_experts_and_may_be_repeated() -> None:
    spawner = FakeSpawner()
    controller = Controller(plan(), spawner)
    controller.start(timeout_s=5)
    spawner.calls.clear()
    controller.close()
    controller.close()
    ended = [worker for worker, call in spawner.calls if call == "close"]
    assert ended[0] == "attention-0"
    assert sorted(ended) == ["attention-0", "expert-0", "expert-1"]
    assert spawner.closed == 2


@pytest.mark.parametrize(("num_experts", "num_attention"), [(0, 1), (1, 0)])
def test_a_cluster_without_one_of_each_is_refused(num_experts: int, num_attention: int) -> None:
    with pytest.raises(ConfigError, match="one of each"):
        plan(num_experts, num_attention)


def test_experts_that_do_not_fit_are_refused_with_the_numbers() -> None:
    spawner = FakeSpawner()
    with pytest.raises(ConfigError, match="8 experts of 10 bytes do not fit"):
        Controller(plan(host_capacity_bytes=30), spawner).start(timeout_s=5)
    assert spawner.closed == 1
