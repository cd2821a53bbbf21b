"""The controller and the driver's half above it, over workers that are plain objects in this process."""

import threading
import time

import pytest

from cluster.driver.driver_control import DriverControl
from cluster.driver.processes import ClusterProcesses
from cluster.worker import LoadProgress, State
from llama4_dist.errors import CheckpointError, ConfigError, UnavailableError
from tests.cluster.fakes import FakeSpawner, fail, plan
from tests.cluster.small_clusters import SmallCluster, hasten
from tests.waiting import wait_until


def test_every_attention_worker_gets_the_topology_of_what_the_hosts_hold() -> None:
    spawner, events = FakeSpawner(), list[LoadProgress]()
    processes = ClusterProcesses(plan(num_attention=2), spawner, progress=events.append)
    addresses = processes.start(timeout_s=5)
    assert addresses == {name: spawner.workers[name].where for name in ("attention-0", "attention-1")}  # type: ignore[attr-defined]
    for worker in spawner.serving():
        topology = worker.topology_in_use
        assert topology is not None
        assert topology.epoch == 1
        assert topology.hosts.keys() == {"expert-0", "expert-1"}
        for host in topology.hosts:
            assert set(topology.placement.held_by(host)) == spawner.hosts()[host].held
    states = {(event.worker, event.state) for event in events}
    assert {(name, state) for name in spawner.workers for state in (State.NEW, State.READY)} <= states


def test_a_slow_load_is_reported_while_it_lasts() -> None:
    release = threading.Event()
    spawner, events = FakeSpawner(expert_1__load=lambda: release.wait(20)), []

    def note(event: LoadProgress) -> None:
        events.append(event)
        if event.state is State.LOADING and event.worker == "expert-1":
            release.set()

    ClusterProcesses(plan(), spawner, progress=note).start(timeout_s=30)
    assert release.is_set(), "it was told of the load before the load was done"
    loading = [event for event in events if event.worker == "expert-1" and event.state is State.LOADING]
    assert (loading[0].done, loading[0].total) == (1, 2)


@pytest.mark.parametrize("method", ["location", "load"])
def test_a_worker_that_dies_at_start_ends_the_start_at_once_and_leaves_nothing(method: str) -> None:
    never = threading.Event()
    died = fail(UnavailableError("the process of expert-1 died", reason="WORKER_LOST"))
    spawner = FakeSpawner(**{f"expert_1__{method}": died, "attention_0__load": lambda: never.wait(20)})
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="expert-1 died"):
        ClusterProcesses(plan(), spawner).start(timeout_s=60)
    assert time.monotonic() - started < 10
    assert {worker for worker, call in spawner.calls if call == "kill"} == {"controller", *spawner.workers}
    assert spawner.closed == 1
    never.set()


def test_the_workers_own_error_reaches_the_caller() -> None:
    spawner = FakeSpawner(expert_0__load=fail(CheckpointError("shard is damaged", file="a.safetensors")))
    with pytest.raises(CheckpointError, match="shard is damaged"):
        ClusterProcesses(plan(), spawner).start(timeout_s=5)


@pytest.mark.parametrize("call", ["attention-0.publish", "attention-0.connect", "expert-1.location", "expert-1.load"])
def test_a_worker_that_hangs_is_named_when_time_is_up(call: str) -> None:
    never = threading.Event()
    spawner = FakeSpawner()
    spawner.faults[call] = lambda: never.wait(20)
    worker, _, method = call.partition(".")
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=f"{worker} did not {method} in time"):
        ClusterProcesses(plan(), spawner).start(timeout_s=0.5)
    assert time.monotonic() - started < 4
    assert spawner.closed == 1
    never.set()


def test_a_worker_that_does_not_answer_is_reported_as_lost() -> None:
    spawner = FakeSpawner(expert_0__status=fail(UnavailableError("died")))
    processes = ClusterProcesses(plan(), spawner)
    processes.start(timeout_s=5)
    statuses = DriverControl(processes).view().workers
    assert statuses[0].worker == "controller"
    assert {status.worker: status.state for status in statuses} == {
        "controller": State.READY,
        "expert-0": State.LOST,
        "expert-1": State.READY,
        "attention-0": State.READY,
    }


def test_closing_stops_attention_before_experts_and_may_be_repeated() -> None:
    spawner = FakeSpawner()
    processes = ClusterProcesses(plan(), spawner)
    processes.start(timeout_s=5)
    processes.close()
    processes.close()
    of_interest = [call for call in spawner.calls if call[1] in ("kill", "close")]
    assert of_interest[0] == ("controller", "kill")
    ended = [worker for worker, call in spawner.calls if call == "close"]
    assert ended[0] == "attention-0"
    assert sorted(ended) == ["attention-0", "expert-0", "expert-1"]
    assert set(spawner.ended) == {"attention-0", "expert-0", "expert-1"}


@pytest.mark.parametrize(("num_experts", "num_attention"), [(0, 1), (1, 0)])
def test_a_cluster_without_one_of_each_is_refused(num_experts: int, num_attention: int) -> None:
    with pytest.raises(ConfigError, match="one of each"):
        plan(num_experts, num_attention)


def test_experts_that_do_not_fit_are_refused_with_the_numbers() -> None:
    spawner = FakeSpawner()
    with pytest.raises(ConfigError, match="8 experts of 10 bytes do not fit"):
        ClusterProcesses(plan(host_capacity_bytes=30), spawner).start(timeout_s=5)
    assert spawner.closed == 1


def test_a_controller_that_hangs_is_named_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.driver.processes.ANSWER_MARGIN_S", 0.1)
    never = threading.Event()
    spawner = FakeSpawner(controller__start=lambda: never.wait(20), controller__progress=lambda: never.wait(20))
    with pytest.raises(UnavailableError, match="controller did not start in time"):
        ClusterProcesses(plan(), spawner).start(timeout_s=0.3)
    assert {worker for worker, call in spawner.calls if call == "kill"} == {"controller", *spawner.workers}
    assert spawner.closed == 1
    never.set()


def test_a_controller_that_dies_is_replaced_by_one_that_learns_everything_from_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hasten(monkeypatch)
    cluster = SmallCluster()
    cluster.scale_well(3)
    before = cluster.topology
    release = threading.Event()
    cluster.spawner.next_life = lambda life: release.wait(5)
    cluster.spawner.die("controller")
    with pytest.raises(UnavailableError, match="controller died") as caught:
        cluster.control.view()
    assert caught.value.reason == "WORKER_LOST"
    wait_until(lambda: cluster.processes._controller is None)
    for change in (cluster.control.view, lambda: cluster.control.scale(2)):
        with pytest.raises(UnavailableError, match="no controller just now") as caught:
            change()
        assert caught.value.reason == "CONTROLLER_LOST"
    release.set()
    cluster.rest()
    assert cluster.topology == before
    assert cluster.topology is not None
    assert cluster.control.view().workers[0].state is State.READY
    assert cluster.scale_well(2).epoch == 3
    cluster.close()


def test_a_controller_that_cannot_take_over_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)
    cluster = SmallCluster()
    fails = iter([fail(RuntimeError("a defect")), fail(RuntimeError("another")), lambda: None])
    cluster.spawner.faults["controller.recover"] = lambda: next(fails)()
    cluster.spawner.die("controller")
    wait_until(lambda: len(cluster.spawner.controllers) == 4)
    cluster.rest()
    assert [life.over for _, life in cluster.spawner.controllers] == [True, True, True, False]
    cluster.close()


def test_an_engine_that_could_not_be_reached_is_used_as_soon_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)
    cluster = SmallCluster()
    cluster.unreachable = {"attention-1"}
    first = cluster.engines["attention-1"]
    cluster.spawner.die("attention-1")
    wait_until(
        lambda: "attention-1" in cluster.processes._engines and cluster.processes._engines["attention-1"] != first
    )
    assert "attention-1" not in cluster.engines
    cluster.unreachable = set()
    wait_until(lambda: cluster.engines == cluster.processes._engines, lambda: f"only {cluster.engines} are used")
    cluster.rest()
    cluster.close()


def test_a_controller_that_is_only_slow_is_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)
    monkeypatch.setattr("cluster.driver.processes.ANSWER_MARGIN_S", 0.05)
    cluster, release = SmallCluster(), threading.Event()
    cluster.spawner.faults["controller.orders"] = lambda: release.wait(5)
    wait_until(lambda: cluster.spawner.calls.count(("controller", "orders")) >= 3)
    num = cluster.spawner.calls.count(("controller", "orders"))
    wait_until(lambda: cluster.spawner.calls.count(("controller", "orders")) >= num + 3)
    assert len(cluster.spawner.controllers) == 1
    release.set()
    cluster.rest()
    cluster.close()


def test_changes_have_to_wait_while_the_head_is_away_and_questions_do_not() -> None:
    cluster = SmallCluster()
    cluster.spawner.answers = lambda timeout_s: False  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="the head of Ray does not answer") as caught:
        cluster.control.scale(3)
    assert caught.value.reason == "HEAD_LOST"
    assert cluster.control.view().epoch == 1
    cluster.close()


def test_more_copies_than_hosts_or_memory_allow_are_reduced_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spawner = FakeSpawner()
    processes = ClusterProcesses(plan(num_replicas=3), spawner)
    processes.start(timeout_s=5)
    assert "num_replicas=3 is reached for 0 of 8 experts" in caplog.text
    assert {len(host.held) for host in spawner.hosts().values()} == {8}
    processes.close()
