"""The cluster's metrics over fake workers: what is known, what is not, and that nothing stale is shown."""

import threading
import time
from collections.abc import Iterator

import pytest

from cluster.admin.load_rates import LoadReading
from cluster.control_plane.census import fewest_copies
from cluster.observe.balance import MAX_READINGS, BalanceWindow
from cluster.observe.collector import ClusterCollector
from cluster.operation import HostLoad
from cluster.planning.placement import Pair
from cluster.reading import ClusterReading, HostReading
from llama4_dist.partition import Partition
from tests.cluster.fake_workers import FakeAttention, FakeHost
from tests.cluster.small_clusters import SmallCluster, hasten
from tests.scraping import Scrape
from tests.waiting import wait_until


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallCluster]:
    hasten(monkeypatch)
    cluster = SmallCluster(3, 2, num_replicas=2)
    yield cluster
    cluster.close()


def collector_of(cluster: SmallCluster, *, per_expert: bool = True) -> ClusterCollector:
    control = cluster.control
    return ClusterCollector(control.reading, control.head_answers, per_expert=per_expert, fresh_s=0.0)


def host_of(cluster: SmallCluster, name: str) -> FakeHost:
    host = cluster.spawner.workers[name]
    assert isinstance(host, FakeHost)
    return host


def test_every_worker_is_up_and_every_expert_has_its_copies(cluster: SmallCluster) -> None:
    cluster.rest()
    collector = collector_of(cluster)
    wait_until(lambda: sum(Scrape(collector.collect()).all("worker_up")) == 5)
    found = Scrape(collector.collect())
    assert found.labels("worker_up", "worker") == {"expert-0", "expert-1", "expert-2", "attention-0", "attention-1"}
    assert found.value("controller_up") == found.value("ray_head_up") == 1.0
    assert found.all("expert_replicas") == [2.0, 2.0], "one series a layer"
    assert found.value("placement_epoch") == 1.0
    assert max(found.all("worker_heartbeat_age_seconds")) < 2.0


def test_changes_are_counted_by_kind_and_result(cluster: SmallCluster) -> None:
    cluster.rest()
    collector = collector_of(cluster)
    cluster.scale_well(4)
    may_load = threading.Event()
    cluster.spawner.faults["expert-4.load"] = may_load.wait
    cluster.control.scale(5)
    running = Scrape(collector.collect())
    may_load.set()
    assert running.all("scale_operation_running", kind="scale") == [1.0]
    wait_until(lambda: not Scrape(collector.collect()).all("scale_operation_running"))
    found = Scrape(collector.collect())
    assert found.value("scale_operations_total", kind="scale", result="done") == 2.0
    assert found.value("placement_epoch") == cluster.topology.epoch > 1


def test_a_dead_host_is_down_counted_and_its_numbers_are_gone(cluster: SmallCluster) -> None:
    cluster.rest()
    collector = collector_of(cluster)
    may_load = threading.Event()
    cluster.spawner.faults["expert-1.load"] = may_load.wait  # its successor takes as long as we look
    cluster.spawner.die("expert-1")
    wait_until(lambda: Scrape(collector.collect()).value("workers_lost_total", worker="expert-1", role="expert") == 1.0)
    found = Scrape(collector.collect())
    assert found.value("worker_up", worker="expert-1") == 0.0
    assert found.value("worker_resident_memory_bytes", worker="expert-1") is None
    assert found.value("expert_worker_tokens_total", worker="expert-1") is None
    may_load.set()
    cluster.rest()
    wait_until(lambda: Scrape(collector.collect()).value("worker_up", worker="expert-1") == 1.0)


def test_a_dead_members_series_are_gone_and_begin_anew_with_its_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)
    cluster = SmallCluster(2, 1, partition=Partition(num_stages=2))
    try:
        cluster.rest()
        collector, dead = collector_of(cluster), "attention-0-stage-1-rank-0"
        stages = {name: cluster.spawner.workers[name] for name in (dead, "attention-0-stage-0-rank-0")}
        for one in stages.values():
            assert isinstance(one, FakeAttention)
            one.rows_sent = 7
        assert sum(Scrape(collector.collect()).all("dispatch_rows_total", group="attention-0")) == 14
        may_load = threading.Event()
        cluster.spawner.faults[f"{dead}.load"] = may_load.wait
        cluster.spawner.die(dead)
        wait_until(lambda: Scrape(collector.collect()).value("workers_lost_total", worker=dead, role="stage") == 1.0)
        found = Scrape(collector.collect())
        assert found.labels("dispatch_rows_total", "worker") == {"attention-0-stage-0-rank-0"}
        assert found.labels("stage_busy_seconds_total", "worker") == {"attention-0-stage-0-rank-0"}
        may_load.set()
        cluster.rest()
        found = Scrape(collector.collect())
        assert found.value("dispatch_rows_total", worker=dead, stage="1", rank="0") == 0.0
        assert found.value("dispatch_rows_total", worker="attention-0-stage-0-rank-0") == 7.0, "it was formed anew"
    finally:
        cluster.close()


def test_without_a_controller_workers_are_absent_and_an_age_grows(cluster: SmallCluster) -> None:
    cluster.rest()
    collector = collector_of(cluster)
    assert Scrape(collector.collect()).all("worker_up")
    cluster.processes._controller = None
    may_recover = threading.Event()
    cluster.spawner.faults["controller.recover"] = may_recover.wait
    time.sleep(0.05)
    found = Scrape(collector.collect())
    may_recover.set()
    assert found.value("controller_up") == 0.0
    assert not found.all("worker_up")
    assert not found.all("expert_worker_tokens_total")
    assert (found.value("cluster_reading_age_seconds") or 0.0) >= 0.05


def test_rows_by_expert_only_grow_also_when_a_host_begins_anew(cluster: SmallCluster) -> None:
    cluster.rest()
    collector = collector_of(cluster)
    host_of(cluster, "expert-0").rows[0, 1] = 70
    assert Scrape(collector.collect()).value("expert_tokens_total", layer="0", expert="1", slice="0") == 70
    cluster.spawner.die("expert-0")
    wait_until(lambda: cluster.spawner.workers["expert-0"] is not None and not cluster.disorder())
    host_of(cluster, "expert-0").rows[0, 1] = 5
    assert Scrape(collector.collect()).value("expert_tokens_total", layer="0", expert="1") == 75
    assert Scrape(collector.collect()).value("expert_worker_tokens_total", worker="expert-0") == 5


def test_a_series_for_each_expert_is_off_unless_asked_for(cluster: SmallCluster) -> None:
    host_of(cluster, "expert-0").rows[0, 1] = 70
    assert not Scrape(collector_of(cluster, per_expert=False).collect()).all("expert_tokens_total")


def test_a_unit_is_named_by_its_expert_and_its_slice_and_memory_is_counted() -> None:
    load = HostLoad(
        host="expert-0",
        incarnation=1,
        rows={(4, 7): 9},
        at_s=0.0,
        num_resident=3,
        num_mapped=5,
        residency_hits=20,
        residency_misses=8,
    )
    reading = ClusterReading(epoch=1, workers=(), hosts=(HostReading(load=load),), replicas={}, ended={}, num_slices=2)
    found = Scrape(ClusterCollector(lambda: reading, lambda: True, per_expert=True).collect())
    assert found.value("expert_tokens_total", layer="4", expert="3", slice="1") == 9
    names = ("resident_slices", "mapped_slices", "residency_hits_total", "residency_misses_total")
    assert [found.value(f"expert_worker_{name}", worker="expert-0") for name in names] == [3, 5, 20, 8]


def reading(taken_s: float, **rows: int) -> LoadReading:
    loads = {
        host: HostLoad(host=host, incarnation=1, at_s=taken_s, rows={(0, 0): number}) for host, number in rows.items()
    }
    return LoadReading(taken_s=taken_s, loads=loads)


HELD: dict[str, list[Pair]] = {"a": [(0, 0)], "b": [(0, 0)], "c": [(0, 0)]}


def test_balance_is_mean_over_busiest_and_an_idle_copy_counts() -> None:
    window = BalanceWindow(window_s=30.0)
    window.note(reading(0.0, a=100, b=100, c=0))
    assert window.balance(HELD) == {}, "one reading has no rate"
    window.note(reading(30.0, a=160, b=130, c=0))
    assert window.balance(HELD) == {0: pytest.approx((60 + 30 + 0) / 3 / 60)}


def test_the_window_slides_and_many_scrapes_do_not_shorten_it() -> None:
    window = BalanceWindow(window_s=30.0)
    for tick in range(1000):  # ten a second
        window.note(reading(tick / 10, a=tick, b=tick if tick < 500 else 500, c=0))
    readings = window._readings
    assert 30.0 <= readings[-1].taken_s - readings[0].taken_s <= 32.0
    assert len(readings) <= MAX_READINGS
    assert window.balance(HELD) == {0: pytest.approx(1 / 3)}, "b stood still in the whole window"


def test_the_fewest_copies_are_those_on_live_hosts() -> None:
    hosts_of = {(0, 0): ("a", "b"), (0, 1): ("b", "c"), (3, 0): ("a",)}
    assert fewest_copies(hosts_of, {"a", "c"}) == {0: 1, 3: 1}
    assert fewest_copies(hosts_of, {"c"}) == {0: 0, 3: 0}
