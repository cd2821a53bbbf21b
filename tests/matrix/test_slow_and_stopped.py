"""FX4, FX18: hosts that stand still or crawl: a copy is asked too, late answers are dropped, they may come back."""

import time
from collections.abc import Callable

import pytest

from llama4_dist.chaos.faults.processes import Stop
from llama4_dist.chaos.history.events import read_file
from llama4_dist.chaos.history.stalls import during, fault_windows, gaps_of, summary
from tests.faults.straggler import CpuLimit
from tests.matrix.conftest import Cases
from tests.matrix.harness import Cluster
from tests.matrix.hosts import StopAt

MAX_STALL_S = 1.0
MAX_NOISE_S = 0.1  # of a machine that does other things too; without avoiding it, a step waits twice as long
WARM = 12
Make = Callable[..., Cluster]


@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.0])
def test_a_stopped_host_with_a_copy_stalls_nobody_for_long_and_is_used_again(
    make: Make, cases: Cases, seconds: float
) -> None:
    cluster = make().start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(Stop(cluster.hosts["expert-1"].pid)):
        time.sleep(seconds)
    cluster.wait_until_used("expert-1")
    assert load.end(label=f"FX4 {seconds} s").added_stall.max_s < MAX_STALL_S
    assert cluster.stats.hedged_rows > 0
    assert cluster.stats.lost_hosts.keys() <= {"REPLY_TIMEOUT"}
    if seconds < 1.0:
        assert not cluster.stats.lost_hosts, "it was given up too soon"


def test_the_answer_of_a_host_stopped_while_computing_comes_late_and_is_dropped(make: Make, cases: Cases) -> None:
    cluster = make().start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(StopAt(cluster.hosts["expert-1"], "computing", after=5)):
        load.wait_for_tokens(4)
    cluster.wait_until_used("expert-1")
    load.end(label="FX4 at computing")
    assert cluster.stats.late_replies > 0
    assert not cluster.stats.lost_hosts


@pytest.mark.parametrize("seconds", [0.2, 3.0])
def test_a_stopped_host_without_a_copy_is_waited_for_and_then_replaced(
    make: Make, cases: Cases, seconds: float
) -> None:
    cluster = make(num_hosts=2, num_replicas=1).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(Stop(cluster.hosts["expert-1"].pid)):
        time.sleep(seconds)
    cluster.wait_until_used("expert-1")
    verdict = load.end(label=f"FX4 without a copy {seconds} s")
    if seconds < 1.0:
        assert not cluster.stats.lost_hosts
    else:
        assert cluster.num_adopted > 0
        assert verdict.added_stall.max_s < 2.0, "the other host adopts when the stopped one is given up"


def test_a_straggler_is_asked_less_and_less_and_hardly_slows_anybody(make: Make, cases: Cases) -> None:
    cluster = make().start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    begun_s = time.monotonic()
    time.sleep(1.5)
    asked, hedged = cluster.stats.rows_out.copy(), cluster.stats.hedged_rows
    with load.history.fault(CpuLimit(cluster.hosts["expert-1"].pid, share=0.1, period_s=0.5)):
        time.sleep(4.0)
    rows = cluster.stats.rows_out - asked
    num_hedged = cluster.stats.hedged_rows - hedged
    time.sleep(1.5)
    load.end(label="FX18")
    events = read_file(load.history.path)
    gaps = [gap for gap in gaps_of(events) if gap.begin_s >= begun_s]
    among = set(during(gaps, fault_windows(events)))
    slow, usual = (summary(gap.length_s for gap in gaps if (gap in among) is wanted) for wanted in (True, False))
    print(
        f"FX18: p99 {slow.p99_s * 1e3:.1f} ms, healthy {usual.p99_s * 1e3:.1f} ms, {num_hedged} of {rows.total()} rows"
        f" hedged, the straggler got {rows['expert-1'] / rows.total():.1%}"
    )
    assert 0 < num_hedged <= 0.1 * rows.total()
    assert rows["expert-1"] < 0.2 * rows.total(), "it would get a third"
    assert slow.p99_s <= 1.5 * usual.p99_s + MAX_NOISE_S
    assert not cluster.stats.lost_hosts
