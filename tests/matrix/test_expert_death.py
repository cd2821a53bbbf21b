"""FX1-3, FX11, FX40: expert hosts are killed, at any point of their work, with copies elsewhere and without."""

import threading
from collections.abc import Callable

import pytest

from llama4_dist.chaos.faults.fault import FaultNotVerified, must
from llama4_dist.chaos.faults.processes import Kill, Stop
from tests.faults.toxics import Direction
from tests.matrix.conftest import Cases
from tests.matrix.harness import Cluster
from tests.matrix.hosts import KillAll, KillAt, Site

MAX_STALL_S = 1.0
GREETING_BYTES = 40
WARM = 8
Make = Callable[..., Cluster]


@pytest.mark.parametrize(
    ("point", "is_tcp"),
    [
        ("idle", False),
        ("receiving", False),
        ("computing", False),
        ("half_reply", False),
        ("replied", False),
        ("half_reply", True),
    ],
)
def test_a_host_killed_while_decoding_costs_a_short_stall_and_no_token(
    make: Make, cases: Cases, point: str, is_tcp: bool
) -> None:
    cluster = make(worker_is_elsewhere=is_tcp).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(KillAt(cluster.hosts["expert-1"], point, after=3), phase="decode"):
        load.wait_for_tokens(WARM)
    verdict = load.end(label=f"FX1 {point} {'tcp' if is_tcp else 'unix'}")
    assert verdict.added_stall.max_s < MAX_STALL_S
    assert cluster.stats.lost_hosts.total() == 1
    assert "REPLY_TIMEOUT" not in cluster.stats.lost_hosts, "its end was waited for, not seen"
    assert "expert-1" not in cluster.live
    assert cluster.num_adopted == 0, "every expert has a second copy"


@pytest.mark.parametrize("point", ["receiving", "computing", "half_reply"])
def test_a_host_killed_while_prompts_are_computed_costs_no_token(make: Make, cases: Cases, point: str) -> None:
    cluster = make().start()
    load = cluster.load(cases.requests, cases.reference)
    fault = KillAt(cluster.hosts["expert-1"], point)
    cluster.hosts["expert-1"].arm(point)  # before the first request: its first frame is of a prompt
    load.start()
    with load.history.fault(fault, phase="prefill"):
        load.wait_for_tokens(WARM)
    assert load.end(label=f"FX1 prefill {point}").added_stall.max_s < MAX_STALL_S


def test_a_point_that_nobody_passes_kills_nobody(make: Make) -> None:
    cluster = make(num_hosts=2)
    fault = KillAt(cluster.hosts["expert-0"], "computing", aim=cluster.hosts["expert-1"])
    with pytest.raises(FaultNotVerified, match="expert-0 died computing"), fault:
        pass


def test_two_workers_lose_the_same_host_and_no_token(make: Make, cases: Cases) -> None:
    cluster = make(num_workers=2).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(KillAt(cluster.hosts["expert-1"], "computing", after=5)):
        load.wait_for_tokens(WARM)
    assert load.end(label="FX1 two workers").added_stall.max_s < MAX_STALL_S
    lost = [worker._follower.dispatcher.stats().lost_hosts.total() for worker in cluster.workers]
    assert lost == [1, 1]


def test_what_only_a_dead_host_held_is_adopted_by_another(make: Make, cases: Cases) -> None:
    cluster = make(num_hosts=2, num_replicas=1).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(Kill(cluster.hosts["expert-1"].pid)):
        load.wait_for_tokens(WARM)
    assert load.end(label="FX2 adoption").added_stall.max_s < MAX_STALL_S
    assert 0 < cluster.num_adopted <= len(cluster.placement.held_by("expert-1"))


def test_a_host_killed_while_it_adopts_is_followed_by_the_next(make: Make, cases: Cases) -> None:
    cluster = make(num_hosts=3, num_replicas=1).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    second = cluster.hosts["expert-1"]
    second.arm("adopting")
    with load.history.fault(Kill(cluster.hosts["expert-0"].pid)):
        must(lambda: second.process.is_dead, "the second host died adopting", timeout_s=10.0)
        load.wait_for_tokens(WARM)
    load.end(label="FX2 killed while adopting")
    assert cluster.live == {"expert-2"}


def test_streams_wait_for_a_new_life_of_the_only_host(make: Make, cases: Cases) -> None:
    cluster = make(num_hosts=1, num_replicas=1).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(Kill(cluster.hosts["expert-0"].pid)):
        must(lambda: not cluster.live, "the worker has no host")
        cluster.respawn("expert-0")
    load.wait_for_tokens(WARM)
    load.end(label="FX2 reload")


def test_streams_that_wait_too_long_end_as_retriable_and_the_next_are_served(make: Make, cases: Cases) -> None:
    cluster = make(num_hosts=1, num_replicas=1, expert_timeout_s=0.3).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_ends(1)
    with load.history.fault(Kill(cluster.hosts["expert-0"].pid)):
        load.wait_for_ends(3)
        cluster.respawn("expert-0")
    load.wait_for_tokens(24)
    outcomes = load.end(allowed_errors={"EXPERT_UNREACHABLE"}, label="FX2 refusal").outcomes
    assert {"finished", "refused"} <= outcomes.keys() <= {"finished", "refused", "failed"}  # who had tokens has failed
    assert outcomes["finished"] >= 2 * len(cases.requests)


def test_when_every_copy_of_an_expert_dies_a_third_host_adopts_it(make: Make, cases: Cases) -> None:
    cluster = make(num_hosts=3).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    doomed = cluster.placement.hosts_of[0, 0]
    with load.history.fault(KillAll([cluster.hosts[name] for name in doomed])):
        load.wait_for_tokens(WARM)
    assert load.end(label="FX3").added_stall.max_s < MAX_STALL_S
    assert cluster.num_adopted > 0


def test_a_node_that_dies_with_all_its_hosts_takes_no_expert_with_it(make: Make, cases: Cases) -> None:
    cluster = make(num_hosts=4, sites=(Site(node="a"), Site(node="b"))).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(KillAll([cluster.hosts["expert-0"], cluster.hosts["expert-2"]])):
        load.wait_for_tokens(WARM)
    assert load.end(label="FX11").added_stall.max_s < MAX_STALL_S
    assert cluster.live == {"expert-1", "expert-3"}
    assert cluster.num_adopted == 0, "copies lie on different nodes"


def test_a_host_killed_before_the_first_request_costs_nothing(make: Make, cases: Cases) -> None:
    cluster = make().start()
    with Kill(cluster.hosts["expert-1"].pid):
        load = cluster.load(cases.requests, cases.reference).start()
        load.wait_for_ends(1)
        load.end(label="FX40 before the first request")


def test_a_host_killed_during_the_first_connection_is_left_out(make: Make, cases: Cases) -> None:
    cluster = make()
    proxy = cluster.detour("expert-1")
    stop = Stop(cluster.hosts["expert-1"].pid)
    stop.inject()
    stop.verify()
    starting = threading.Thread(target=cluster.start)
    starting.start()
    must(lambda: proxy.counters(Direction.TO_SERVER).read >= GREETING_BYTES, "the handshake has begun")
    with Kill(cluster.hosts["expert-1"].pid):
        starting.join(60)
        assert not starting.is_alive(), "the start hangs"
        load = cluster.load(cases.requests, cases.reference).start()
        load.wait_for_ends(1)
        load.end(label="FX40 during the first connection")
        assert cluster.live == {"expert-0", "expert-2"}
