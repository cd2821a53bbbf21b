"""The controller's watch: who is gone is replaced, once, by a process that follows what is published."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.operation import Kind, Phase
from cluster.worker import State
from llama4_dist.errors import EngineError, UnavailableError
from tests.cluster.fake_workers import GEOMETRY
from tests.cluster.fakes import FakeSpawner, fail
from tests.cluster.small_clusters import SmallCluster, hasten
from tests.waiting import wait_until

Make = Callable[..., SmallCluster]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    hasten(monkeypatch)
    made: list[SmallCluster] = []

    def make(*arguments: int, **options: Any) -> SmallCluster:
        made.append(SmallCluster(*arguments, **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


class Clock:
    """Stands still until it is told."""

    def __init__(self, cluster: SmallCluster) -> None:
        self.now_s = 1000.0
        watch = cluster.spawner.controller._watch
        watch._clock = watch._revival._clock = lambda: self.now_s
        watch._heard_s = dict.fromkeys(watch._heard_s, self.now_s)


def repairs(cluster: SmallCluster) -> list[Any]:
    return [one for one in cluster.control.operations() if one.kind is Kind.REPAIR]


def looks(cluster: SmallCluster, num: int) -> None:
    """Wait until the watch has looked so often."""
    calls = cluster.spawner.calls
    before = calls.count(("attention-0", "status"))
    wait_until(lambda: calls.count(("attention-0", "status")) >= before + num + 1)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_dead_host_is_repaired_by_a_process_of_the_same_id(make: Make, num_replicas: int) -> None:
    cluster = make(3, num_replicas=num_replicas)
    held = set(cluster.topology.placement.held_by("expert-1"))
    old = cluster.spawner.workers["expert-1"]
    cluster.spawner.die("expert-1")
    wait_until(lambda: cluster.spawner.workers["expert-1"] is not old)
    cluster.rest()
    (repair,) = repairs(cluster)
    assert repair.phase is Phase.DONE
    assert repair.change.added == ("expert-1",)
    assert repair.moves_done == len(held)
    assert any("no live replica" in warning for warning in repair.warnings) == (num_replicas == 1)
    assert set(cluster.topology.placement.held_by("expert-1")) == held


def test_the_view_names_who_is_lost_until_it_is_back(make: Make) -> None:
    cluster, release = make(2), threading.Event()
    cluster.spawner.spawn_fault = lambda worker: release.wait(5)
    for worker in ("expert-1", "attention-1"):
        cluster.spawner.die(worker)

    def lost() -> set[str]:
        return {one.worker for one in cluster.control.view().workers if one.state is State.LOST}

    wait_until(lambda: lost() == {"expert-1", "attention-1"} and cluster.control.view().operation)
    release.set()
    cluster.rest()
    assert lost() == set()


def test_what_a_dead_host_held_goes_to_those_left_if_no_process_can_be_had(make: Make) -> None:
    cluster = make(3)

    def refuse(worker: str) -> None:
        raise UnavailableError("no room", reason="INSUFFICIENT_CAPACITY")

    for _ in range(2):  # the second time a process is asked for again
        cluster.spawner.spawn_fault = refuse
        cluster.spawner.die("expert-1")
        wait_until(lambda: len(cluster.topology.hosts) == 2)
        cluster.rest()
        done, failed = repairs(cluster)[:2]
        assert (failed.error_reason, failed.change.added) == ("INSUFFICIENT_CAPACITY", ("expert-1",))
        assert (done.phase, done.change.added) == (Phase.DONE, ())
        cluster.spawner.spawn_fault = lambda worker: None
        cluster.scale_well(3)


def test_where_those_left_have_no_memory_a_process_is_asked_for_again_and_again(make: Make) -> None:
    cluster = make(4, host_capacity_bytes=20)
    refusals: list[str] = []

    def refuse(worker: str) -> None:
        refusals.append(worker)
        if len(refusals) < 3:
            raise UnavailableError("no room", reason="INSUFFICIENT_CAPACITY")

    cluster.spawner.spawn_fault = refuse
    cluster.spawner.die("expert-1")
    wait_until(lambda: len(refusals) == 3)
    cluster.rest()
    assert len(cluster.topology.hosts) == 4


def test_a_silent_host_is_ended_after_ten_seconds_before_its_replacement_starts(make: Make) -> None:
    cluster, release = make(2), threading.Event()
    clock = Clock(cluster)
    old = cluster.spawner.workers["expert-1"]
    cluster.spawner.faults["expert-1.status"] = lambda: release.wait(10)
    clock.now_s += 9.9
    looks(cluster, 2)
    assert cluster.spawner.ended == []
    clock.now_s += 0.2
    wait_until(lambda: cluster.spawner.ended == ["expert-1"])
    cluster.spawner.faults.clear()
    wait_until(lambda: cluster.spawner.workers["expert-1"] is not old)
    release.set()
    cluster.rest()  # the fakes note a breach if a process is started while one of its id lives


def test_a_host_that_answers_in_between_is_not_ended(make: Make) -> None:
    cluster, release = make(2), threading.Event()
    clock = Clock(cluster)
    for _ in range(3):
        cluster.spawner.faults["expert-1.status"] = lambda: release.wait(10)
        clock.now_s += 6.0
        looks(cluster, 1)
        cluster.spawner.faults.clear()
        looks(cluster, 2)
    release.set()
    assert cluster.spawner.ended == []


def test_a_new_process_may_take_its_time_for_its_first_word(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch, watch__SILENCE_S=0.02, watch__ANSWER_TIMEOUT_S=0.02)
    cluster, release = make(2), threading.Event()
    for method in ("status", "location"):
        cluster.spawner.faults[f"expert-2.{method}"] = lambda: release.wait(10)
    operation = cluster.control.scale(3)
    wait_until(lambda: ("expert-2", "status") in cluster.spawner.calls)
    looks(cluster, 4)
    release.set()
    assert cluster.end_of(operation).phase is Phase.DONE
    cluster.rest()


def test_a_dead_attention_worker_is_replaced_and_serves_under_another_address(make: Make) -> None:
    cluster = make(2)
    before = dict(cluster.engines)
    cluster.spawner.die("attention-1")
    wait_until(lambda: cluster.engines.get("attention-1", before["attention-1"]) != before["attention-1"])
    cluster.rest()
    assert cluster.engines["attention-0"] == before["attention-0"]
    assert cluster.control.operations() == (), "no expert moves for it"
    assert cluster.attention(1).epochs == [1]


def test_an_attention_worker_that_fails_to_start_is_started_again(make: Make) -> None:
    cluster = make(2)
    failures = iter(["load", "publish", "serve"])

    def prepare(worker: str) -> None:
        for method in ("load", "publish", "serve"):
            cluster.spawner.faults.pop(f"{worker}.{method}", None)
        if method := next(failures, ""):
            cluster.spawner.faults[f"{worker}.{method}"] = fail(EngineError("broken"))

    cluster.spawner.spawn_fault = prepare
    cluster.spawner.die("attention-1")
    wait_until(lambda: cluster.spawner.ended.count("attention-1") == 4)
    cluster.rest()


@pytest.mark.parametrize("method", ["load", "publish"])
def test_an_attention_worker_that_starts_during_a_change_follows_its_epoch(make: Make, method: str) -> None:
    cluster, release = make(2), threading.Event()
    cluster.spawner.faults[f"attention-1.{method}"] = lambda: release.wait(5)
    cluster.spawner.calls.clear()
    cluster.spawner.die("attention-1")
    wait_until(lambda: ("attention-1", method) in cluster.spawner.calls)
    ended = cluster.scale(3)
    assert (ended.phase, cluster.topology.epoch) == (Phase.DONE, 2)
    release.set()
    cluster.rest()
    assert cluster.attention(1).epochs[-1] == 2


def test_nothing_is_repaired_while_another_operation_runs(make: Make) -> None:
    cluster, release = make(3, num_replicas=2), threading.Event()
    cluster.spawner.faults["expert-3.load"] = lambda: release.wait(5)
    operation = cluster.control.scale(4)
    wait_until(lambda: ("expert-3", "load") in cluster.spawner.calls)
    cluster.spawner.die("expert-0")
    looks(cluster, 3)
    assert cluster.control.view().operation == operation.name
    assert repairs(cluster) == []
    release.set()
    cluster.end_of(operation)
    wait_until(lambda: repairs(cluster))
    cluster.rest()


def test_a_change_of_a_cluster_that_lacks_a_host_sees_to_that_too(make: Make) -> None:
    cluster = make(3)
    cluster.spawner.spawn_fault = fail(UnavailableError("no", reason="INSUFFICIENT_CAPACITY"))  # type: ignore[assignment]
    clock = Clock(cluster)
    cluster.spawner.faults["attention-0.connect"] = fail(EngineError("no"))  # nor can it be repaired without
    cluster.spawner.spawn_fault = lambda worker: None
    cluster.spawner.die("expert-1")
    wait_until(lambda: repairs(cluster) and repairs(cluster)[0].phase is Phase.FAILED)
    cluster.spawner.faults.clear()
    wait_until(lambda: not cluster.spawner.controller.ledger.running)
    ended = cluster.scale(2)
    assert (ended.phase, ended.change.added, ended.change.removed) == (Phase.DONE, (), ())  # type: ignore[union-attr]
    cluster.rest()
    assert cluster.topology.hosts.keys() == {"expert-0", "expert-2"}
    assert clock.now_s == 1000.0


def test_a_repair_that_fails_is_not_tried_again_at_once(make: Make) -> None:
    cluster = make(2)
    clock = Clock(cluster)
    cluster.spawner.faults["attention-0.connect"] = fail(EngineError("no"))
    cluster.spawner.die("expert-1")
    wait_until(lambda: repairs(cluster) and repairs(cluster)[0].phase is Phase.FAILED)
    looks(cluster, 5)
    assert len(repairs(cluster)) == 1
    clock.now_s += 0.06
    wait_until(lambda: len(repairs(cluster)) == 2 and repairs(cluster)[0].phase is Phase.FAILED)
    looks(cluster, 5)
    assert len(repairs(cluster)) == 2
    cluster.spawner.faults.clear()
    clock.now_s += 0.2
    cluster.rest()


def test_a_repair_the_operator_deleted_does_not_end_the_watch(make: Make) -> None:
    cluster = make(2)
    for _ in range(2):
        old = cluster.spawner.workers["expert-1"]
        cluster.spawner.die("expert-1")

        def is_replaced(old: object = old) -> bool:
            return cluster.spawner.workers["expert-1"] is not old

        wait_until(is_replaced)
        cluster.rest()
        for operation in repairs(cluster):
            cluster.control.delete(operation.name)


def test_a_defect_in_one_look_does_not_end_the_watch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = make(2)
    watch = cluster.spawner.controller._watch
    failed = threading.Event()

    def broken() -> None:
        monkeypatch.undo()
        hasten(monkeypatch)
        failed.set()
        raise LookupError("a defect")

    monkeypatch.setattr(watch, "look", broken)
    assert failed.wait(5)
    cluster.spawner.die("expert-1")
    wait_until(lambda: repairs(cluster))
    cluster.rest()


def test_a_cluster_that_lost_every_worker_begins_anew(make: Make) -> None:
    cluster = make(2)
    for worker in tuple(cluster.spawner.workers):
        cluster.spawner.die(worker)
    wait_until(lambda: repairs(cluster))
    cluster.rest()
    assert cluster.topology.epoch == 2


# --- a controller that takes over in the middle ---------------------------------------------------------------------


def test_what_a_change_had_started_is_gone_before_the_next_controller_may_change_anything(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasten(monkeypatch, watch__INTERVAL_S=60.0)
    cluster, release = make(2), threading.Event()
    cluster.spawner.faults["expert-2.load"] = lambda: release.wait(5)
    cluster.control.scale(3)
    wait_until(lambda: ("expert-2", "load") in cluster.spawner.calls)
    cluster.spawner.die("controller")
    wait_until(lambda: len(cluster.spawner.controllers) == 2)
    cluster.rest()
    release.set()


@pytest.mark.parametrize("held", ["expert-1.location", "expert-1.load", "expert-1.fingerprints"])
def test_a_process_that_was_to_repair_is_no_member_of_the_epoch_of_its_predecessor(make: Make, held: str) -> None:
    cluster, release = make(2), threading.Event()
    cluster.spawner.calls.clear()
    cluster.spawner.faults[held] = lambda: release.wait(5)
    cluster.spawner.die("expert-1")
    wait_until(lambda: tuple(held.split(".")) in cluster.spawner.calls)
    cluster.spawner.die("controller")
    wait_until(lambda: len(cluster.spawner.controllers) == 2)
    cluster.spawner.faults.clear()
    release.set()
    cluster.rest()
    assert cluster.topology.epoch == 2


@pytest.mark.parametrize("method", ["load", "publish", "serve"])
def test_an_attention_worker_that_was_half_up_is_replaced(make: Make, method: str) -> None:
    cluster, release = make(2), threading.Event()
    cluster.spawner.calls.clear()
    cluster.spawner.faults[f"attention-1.{method}"] = lambda: release.wait(5)
    cluster.spawner.die("attention-1")
    wait_until(lambda: ("attention-1", method) in cluster.spawner.calls)
    cluster.spawner.die("controller")
    wait_until(lambda: len(cluster.spawner.controllers) == 2)
    cluster.spawner.faults.clear()
    release.set()
    cluster.rest()


def test_an_attention_worker_that_stayed_behind_switches_before_anything_is_ended(make: Make) -> None:
    cluster = make(3)
    first, life = cluster.spawner.controllers[-1]
    cluster.spawner.faults["attention-1.publish"] = fail(EngineError("not now"))
    cluster.spawner.faults["expert-0.keep"] = lambda: cluster.spawner.die("controller")
    cluster.control.scale(2)
    wait_until(lambda: life.over)
    del cluster.spawner.breaches[:]
    cluster.spawner.faults.clear()
    cluster.rest()
    assert cluster.attention(1).epochs == [1, 2]
    assert first is not cluster.spawner.controller


def test_an_attention_worker_that_does_not_say_what_it_follows_is_replaced(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasten(monkeypatch, controller__RECOVER_TIMEOUT_S=0.1)
    cluster, release = make(2), threading.Event()
    old = cluster.attention(1)
    cluster.spawner.faults["attention-1.topology"] = lambda: release.wait(5)
    cluster.spawner.die("controller")
    wait_until(lambda: cluster.attention(1) is not old)
    cluster.spawner.faults.clear()
    release.set()
    cluster.rest()
    assert "attention-1" in cluster.spawner.ended


def test_without_any_attention_worker_the_hosts_say_what_there_is(make: Make) -> None:
    cluster = make(3, num_replicas=2)
    hosts = cluster.topology.hosts
    for worker in ("attention-0", "attention-1", "controller"):
        cluster.spawner.die(worker)
    wait_until(lambda: len(cluster.spawner.controllers) == 2)
    cluster.rest()
    assert cluster.topology.hosts == hosts
    assert "expert-0" not in cluster.spawner.ended
    first = [on[0] for on in cluster.topology.placement.hosts_of.values()]
    assert max(map(first.count, hosts)) <= len(GEOMETRY.pairs) // 2, "the preferred hosts are spread"


def test_a_cluster_of_which_nothing_is_left_begins_anew_under_the_next_controller(make: Make) -> None:
    cluster = make(2, spawner=FakeSpawner())
    for worker in (*cluster.spawner.workers, "controller"):
        cluster.spawner.die(worker)
    wait_until(lambda: len(cluster.spawner.controllers) == 2)
    cluster.rest()
    assert len(cluster.topology.hosts) == 2
