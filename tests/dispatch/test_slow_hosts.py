"""Slow, stopped and wrong hosts: a replica is asked too, the slow one is avoided, and what it says late is dropped."""

import pytest
import torch
from torch import Tensor

from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.links.inproc import Faults
from llama4_dist.dispatch.reply_times import Deadlines
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.dispatch.suspects import FIRST_S, FORGIVEN_AFTER_S, LONGEST_S, Suspects
from tests.dispatch.fakes import (
    NUM_EXPERTS,
    NUM_LAYERS,
    WIDTH,
    InprocCluster,
    ScalingExperts,
    direct,
    factor,
    random_batch,
    whole,
)

DEADLINES = Deadlines()
PAIRS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
DELAY_S = 0.4  # longer than `unknown_hedge_s`, shorter than `lose_floor_s`


def two_hosts() -> InprocCluster:
    """Every expert on a and b; a is preferred."""
    return InprocCluster(RoutingTable(epoch=1, replicas={pair: whole("a", "b") for pair in PAIRS}))


def slow_down(dispatcher: Dispatcher, cluster: InprocCluster, host: str, faults: Faults | None) -> None:
    cluster.ends["worker-0", host]._faults = faults  # of its replies


def step(dispatcher: Dispatcher, number: int, num_tokens: int = 8) -> None:
    dispatcher.begin_step(number)
    batch = random_batch(num_tokens, 1, seed=number)
    assert torch.equal(
        dispatcher.combine(dispatcher.dispatch(number % NUM_LAYERS, *batch)), direct(number % NUM_LAYERS, *batch)
    )


def test_a_slow_host_is_hedged_avoided_and_tried_again() -> None:
    cluster = two_hosts()
    dispatcher = cluster.dispatcher()
    slow_down(dispatcher, cluster, "a", Faults(delay=1.0, delay_s=DELAY_S))
    begun = cluster.clock.now
    step(dispatcher, 0)
    assert cluster.clock.now - begun == pytest.approx(DEADLINES.unknown_hedge_s, abs=0.01)
    asked = dispatcher.stats().frames_out["a"]
    step(dispatcher, 1)
    assert dispatcher.stats().frames_out["a"] == asked, "a suspect was asked although a replica is there"
    slow_down(dispatcher, cluster, "a", None)
    cluster.clock.now += FIRST_S
    step(dispatcher, 2)
    assert dispatcher.stats().frames_out["a"] > asked
    assert not dispatcher.stats().lost_hosts


def test_the_late_answer_of_a_hedged_host_is_dropped() -> None:
    cluster = two_hosts()
    dispatcher = cluster.dispatcher()
    slow_down(dispatcher, cluster, "a", Faults(delay=1.0, delay_s=DELAY_S))
    step(dispatcher, 0)
    cluster.clock.now += DELAY_S
    slow_down(dispatcher, cluster, "a", None)
    step(dispatcher, 1)
    assert dispatcher.stats().late_replies > 0


def test_a_slow_host_without_a_replica_is_waited_for() -> None:
    cluster = InprocCluster(RoutingTable(epoch=1, replicas={pair: whole("a") for pair in PAIRS}))
    dispatcher = cluster.dispatcher()
    slow_down(dispatcher, cluster, "a", Faults(delay=1.0, delay_s=DELAY_S))
    step(dispatcher, 0)
    assert dispatcher.stats().hedged_rows == 0
    assert not dispatcher.stats().lost_hosts


def test_a_straggler_is_asked_less_and_less() -> None:
    cluster = two_hosts()
    dispatcher = cluster.dispatcher()
    for number in range(40):  # now the usual times are known
        step(dispatcher, number)
    slow_down(dispatcher, cluster, "a", Faults(delay=1.0, delay_s=0.3))
    asked, begun = dispatcher.stats().frames_out["a"], cluster.clock.now
    for number in range(40, 1040):
        cluster.clock.now += 0.02  # the rest of a step
        step(dispatcher, number)
    assert cluster.clock.now - begun > 20.0
    assert dispatcher.stats().frames_out["a"] - asked <= 8
    assert dispatcher.stats().hedged_rows <= 0.05 * 8 * 1000


def test_a_host_that_keeps_silent_is_given_up_even_if_nobody_waits_for_it() -> None:
    cluster = two_hosts()
    lost: list[tuple[str, int, str]] = []
    dispatcher = cluster.dispatcher(on_lost=lambda *event: lost.append(event))
    slow_down(dispatcher, cluster, "a", Faults(drop=1.0))
    step(dispatcher, 0)
    cluster.clock.now += DEADLINES.unknown_lose_s
    step(dispatcher, 1)
    assert lost == [("a", 0, "REPLY_TIMEOUT")]


def test_an_expert_whose_only_host_dies_is_adopted_by_a_live_one() -> None:
    table = RoutingTable(epoch=1, replicas={(layer, e): whole("abc"[e % 3]) for layer, e in PAIRS})
    cluster = InprocCluster(table, room=len(PAIRS))
    dispatcher = cluster.dispatcher()
    batch = random_batch(64, 2)
    in_flight = dispatcher.dispatch(0, *batch)
    cluster.ends["worker-0", "b"].abort()
    assert torch.equal(dispatcher.combine(in_flight), direct(0, *batch))
    adopted = {(0, e) for e in range(NUM_EXPERTS) if e % 3 == 1}
    assert adopted <= cluster.experts["a"].holds | cluster.experts["c"].holds
    assert sum(server.stats().adopted for server in cluster.servers.values()) == len(adopted)
    before = [server.stats().adopted for server in cluster.servers.values()]
    batch = random_batch(64, 2, seed=9)
    assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch)), direct(0, *batch))
    assert before == [server.stats().adopted for server in cluster.servers.values()], "adopted a second time"


def test_a_host_without_room_passes_an_orphan_on() -> None:
    table = RoutingTable(epoch=1, replicas={(layer, e): whole("abc"[e % 3]) for layer, e in PAIRS})
    cluster = InprocCluster(table)
    cluster.experts["c"].room = len(PAIRS)
    dispatcher = cluster.dispatcher()
    cluster.ends["worker-0", "a"].abort()
    batch = random_batch(64, 2)
    assert torch.equal(dispatcher.combine(dispatcher.dispatch(1, *batch)), direct(1, *batch))
    assert dispatcher.stats().refusals["NO_ROOM"] > 0
    assert not cluster.servers["b"].stats().adopted


def test_two_workers_give_an_orphan_to_the_same_host() -> None:
    table = RoutingTable(epoch=1, replicas={(layer, e): whole("abcd"[e % 4]) for layer, e in PAIRS})
    cluster = InprocCluster(table, room=len(PAIRS))
    for worker in ("worker-0", "worker-1"):
        dispatcher = cluster.dispatcher(worker)
        cluster.ends[worker, "a"].abort()
        batch = random_batch(64, 2)
        assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch)), direct(0, *batch))
    assert sum(server.stats().adopted for server in cluster.servers.values()) == NUM_EXPERTS / 4


def test_a_host_that_returns_gets_its_experts_back() -> None:
    table = RoutingTable(epoch=1, replicas={(layer, e): whole("ab"[e % 2]) for layer, e in PAIRS})
    cluster = InprocCluster(table, room=len(PAIRS))
    dispatcher = cluster.dispatcher()
    cluster.ends["worker-0", "a"].abort()
    step(dispatcher, 0)
    link = cluster.servers["a"].open_inproc(worker="worker-0", incarnation=1)
    dispatcher.switch(dispatcher.published, {**dispatcher.links, "a": link})
    asked = dispatcher.stats().frames_out["a"]
    step(dispatcher, 1, num_tokens=64)
    assert dispatcher.stats().frames_out["a"] > asked
    assert dispatcher.table.replicas[0, 0] == whole("a")


class WrongExperts(ScalingExperts):
    """One bit of one weight has flipped."""

    def __call__(self, layer, groups, x_RD, out_RD) -> None:
        super().__call__(layer, groups, x_RD, out_RD)
        out_RD[:, 2] *= 1.0009765625


def referee(layer: int, expert: int, x_RD: Tensor) -> Tensor:
    return x_RD * factor(layer, expert)


@pytest.mark.parametrize("liar", ["a", "b"])
def test_a_host_that_computes_wrong_answers_is_found_by_a_second_one(liar: str) -> None:
    cluster = two_hosts()
    cluster.experts[liar].__class__ = WrongExperts
    dispatcher = cluster.dispatcher(checks=CrossCheck(every=4, referee=referee))
    for number in range(12):
        dispatcher.begin_step(number)
        dispatcher.combine(dispatcher.dispatch(0, *random_batch(8, 1)))
    assert dispatcher.stats().wrong_answers == {liar: 1}
    assert dispatcher.stats().lost_hosts == {"ANSWER_WRONG": 1}
    assert dispatcher.table.hosts == {"a", "b"} - {liar}


def test_checks_of_sound_hosts_accuse_nobody_and_cost_what_they_say() -> None:
    cluster = two_hosts()
    dispatcher = cluster.dispatcher(checks=CrossCheck(every=5, referee=referee))
    for number in range(50):
        step(dispatcher, number)
    assert 50 // 5 - 1 <= dispatcher.stats().checked_frames <= 50 // 5  # the last answer may not have been read
    assert not dispatcher.stats().wrong_answers


def test_without_a_referee_nobody_is_accused() -> None:
    cluster = two_hosts()
    cluster.experts["b"].__class__ = WrongExperts
    dispatcher = cluster.dispatcher(checks=CrossCheck(every=1))
    for number in range(10):
        step(dispatcher, number)
    assert dispatcher.stats().checked_frames > 0
    assert not dispatcher.stats().lost_hosts


def test_a_referee_that_agrees_with_neither_is_of_another_kind() -> None:
    cluster = two_hosts()
    cluster.experts["b"].__class__ = WrongExperts
    checks = CrossCheck(every=1, referee=lambda layer, expert, x_RD: torch.zeros(len(x_RD), WIDTH))
    dispatcher = cluster.dispatcher(checks=checks)
    for number in range(10):
        step(dispatcher, number)
    assert not dispatcher.stats().lost_hosts


def test_each_miss_counts_longer_than_the_one_before_and_all_are_forgiven() -> None:
    suspects = Suspects()
    durations = []
    now_s = 0.0
    for _ in range(10):
        suspects.miss("a", now_s)
        begun_s = now_s
        while "a" in suspects.avoided:
            now_s += 0.05
            suspects.expire(now_s)
        durations.append(now_s - begun_s)
    assert durations[:3] == pytest.approx([FIRST_S, 2 * FIRST_S, 4 * FIRST_S], abs=0.06)
    assert durations[-1] == pytest.approx(LONGEST_S, abs=0.06)
    suspects.miss("a", now_s + FORGIVEN_AFTER_S + 1.0)
    suspects.expire(now_s + FORGIVEN_AFTER_S + 1.0 + FIRST_S)
    assert not suspects.avoided
