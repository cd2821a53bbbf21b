"""The controller and the driver's half above it, over workers that are plain objects in this process."""

import threading
import time

import pytest

from cluster.processes import ClusterProcesses
from cluster.worker import State
from llama4_dist.errors import CheckpointError, ConfigError, UnavailableError
from tests.cluster.fakes import FakeSpawner, fail, plan


def test_every_attention_worker_gets_the_topology_of_what_the_hosts_hold() -> None:
    spawner, events = FakeSpawner(), []
    processes = ClusterProcesses(plan(num_attention=2), spawner, progress=events.append)
    assert processes.start(timeout_s=5) == ("address of attention-0", "address of attention-1")
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
    ClusterProcesses(plan(), spawner, progress=events.append).start(timeout_s=5)
    loading = [event for event in events if event.state is State.LOADING]
    assert {event.worker for event in loading} == {"expert-1"}
    assert (loading[0].done, loading[0].total) == (1, 2)


@pytest.mark.parametrize("method", ["location", "load"])
def test_a_worker_that_dies_at_start_ends_the_start_at_once_and_leaves_nothing(method: str) -> None:
    never = threading.Event()
    died = fail(UnavailableError("the process of expert-1 died", reason="WORKER_LOST"))
    spawner = FakeSpawner(**{f"expert_1__{method}": died, f"attention_0__{method}": lambda: never.wait(20)})
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


def test_a_worker_that_hangs_is_named_when_time_is_up() -> None:
    never = threading.Event()
    spawner = FakeSpawner(attention_0__publish=lambda: never.wait(20))
    with pytest.raises(UnavailableError, match="attention-0 did not publish in time"):
        ClusterProcesses(plan(), spawner).start(timeout_s=0.5)
    assert spawner.closed == 1
    never.set()


def test_a_worker_that_does_not_answer_is_reported_as_lost() -> None:
    spawner = FakeSpawner(expert_0__status=fail(UnavailableError("died")))
    processes = ClusterProcesses(plan(), spawner)
    processes.start(timeout_s=5)
    assert {status.worker: status.state for status in processes.status()} == {
        "controller": State.READY,
        "expert-0": State.LOST,
        "expert-1": State.READY,
        "attention-0": State.READY,
    }


def test_closing_stops_attention_before_experts_and_may_be_repeated() -> None:
    spawner = FakeSpawner()
    processes = ClusterProcesses(plan(), spawner)
    processes.start(timeout_s=5)
    spawner.calls.clear()
    processes.close()
    processes.close()
    assert spawner.calls[0] == ("controller", "kill")
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
        ClusterProcesses(plan(host_capacity_bytes=30), spawner).start(timeout_s=5)
    assert spawner.closed == 1


def test_a_controller_that_hangs_is_named_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.processes.ANSWER_MARGIN_S", 0.1)
    never = threading.Event()
    spawner = FakeSpawner(controller__start=lambda: never.wait(20), controller__progress=lambda: never.wait(20))
    with pytest.raises(UnavailableError, match="controller did not start in time"):
        ClusterProcesses(plan(), spawner).start(timeout_s=0.3)
    assert {worker for worker, call in spawner.calls if call == "kill"} == {"controller", *spawner.workers}
    assert spawner.closed == 1
    never.set()


def test_a_controller_that_is_gone_is_named_by_status_and_its_workers_are_still_ended() -> None:
    spawner = FakeSpawner(controller__status=fail(UnavailableError("the process of controller died")))
    processes = ClusterProcesses(plan(), spawner)
    processes.start(timeout_s=5)
    with pytest.raises(UnavailableError, match="controller died"):
        processes.status()
    processes.close()
    assert {worker for worker, call in spawner.calls if call == "close"} == spawner.workers.keys()
    with pytest.raises(UnavailableError, match="closed"):
        processes.status()


def test_a_placement_the_caller_asked_wrongly_leaves_the_spawner_closed_once() -> None:
    spawner = FakeSpawner()
    with pytest.raises(ConfigError, match="num_replicas=3"):
        ClusterProcesses(plan(num_replicas=3), spawner).start(timeout_s=5)
    assert spawner.closed == 1
