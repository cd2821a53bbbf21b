"""Dispatch and combine over links inside the process."""

from collections import Counter

import pytest
import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.links.inproc import Faults
from llama4_dist.dispatch.links.link import LinkLimits
from llama4_dist.dispatch.reply_times import Deadlines
from llama4_dist.dispatch.routing_table import Replica, RoutingTable
from llama4_dist.errors import EngineError, UnavailableError
from tests.dispatch.fakes import (
    NUM_EXPERTS,
    WIDTH,
    InprocCluster,
    ScalingExperts,
    direct,
    random_batch,
    random_table,
    whole,
)

DEADLINES = Deadlines()


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
def test_combine_undoes_dispatch(num_tokens: int, num_slots: int, num_hosts: int) -> None:
    dispatcher = InprocCluster(random_table(num_hosts, seed=num_tokens)).dispatcher()
    x_TD, experts_TK, scores_TK = random_batch(num_tokens, num_slots)
    for layer in range(3):
        y_TD = dispatcher.combine(dispatcher.dispatch(layer, x_TD, experts_TK, scores_TK))
        assert torch.equal(y_TD, direct(layer, x_TD, experts_TK, scores_TK))


def run(dispatcher: Dispatcher, layer: int = 0, *, num_tokens: int = 24, num_slots: int = 1, seed: int = 0) -> None:
    """Dispatch and combine a random batch and compare with the direct computation."""
    batch = random_batch(num_tokens, num_slots, seed=seed)
    assert torch.equal(dispatcher.combine(dispatcher.dispatch(layer, *batch)), direct(layer, *batch))


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize("num_slices", [2, 3])
def test_slices_of_an_expert_are_summed_in_their_order(num_slices: int, num_tokens: int, num_slots: int) -> None:
    dispatcher = InprocCluster(random_table(5, num_slices=num_slices)).dispatcher()
    batch = random_batch(num_tokens, num_slots)
    y_TD = dispatcher.combine(dispatcher.dispatch(2, *batch))
    assert torch.equal(y_TD, direct(2, *batch, num_slices=num_slices))
    assert sum(dispatcher.stats().rows_out.values()) == num_tokens * num_slots * num_slices


def test_partial_outputs_of_bfloat16_rows_are_added_in_float32_and_rounded_once() -> None:
    dispatcher = InprocCluster(random_table(4, num_slices=3), dtype=torch.bfloat16).dispatcher()
    batch = random_batch(24, 2, dtype=torch.bfloat16)
    y_TD = dispatcher.combine(dispatcher.dispatch(0, *batch))
    assert torch.equal(y_TD, direct(0, *batch, num_slices=3))


@pytest.mark.parametrize("lost", [("host-0",), ("host-1",), ("host-0", "host-3")])
def test_lost_slices_move_to_their_replicas_and_the_sum_is_the_same(lost: tuple[str, ...]) -> None:
    cluster = InprocCluster(random_table(5, num_replicas=3, num_slices=2))
    dispatcher = cluster.dispatcher()
    batch = random_batch(64, 2)
    in_flight = dispatcher.dispatch(1, *batch)
    for host in lost:
        cluster.ends["worker-0", host].abort()
    assert torch.equal(dispatcher.combine(in_flight), direct(1, *batch, num_slices=2))
    assert dispatcher.stats().resent_rows > 0


def test_only_the_slices_nobody_holds_any_more_are_adopted() -> None:
    cluster = InprocCluster(random_table(3, num_slices=2), room=99)
    before = {host: set(experts.held) for host, experts in cluster.experts.items()}
    dispatcher = cluster.dispatcher()
    cluster.ends["worker-0", "host-0"].abort()
    batch = random_batch(64, 2)
    y_TD = dispatcher.combine(dispatcher.dispatch(1, *batch))
    assert torch.equal(y_TD, direct(1, *batch, num_slices=2))
    adopted = {pair for host in ("host-1", "host-2") for pair in cluster.experts[host].held - before[host]}
    assert adopted
    assert adopted <= before["host-0"]
    experts_used = set(batch[1].flatten().tolist())
    assert adopted == {(layer, unit) for layer, unit in before["host-0"] if layer == 1 and unit // 2 in experts_used}


def test_an_expert_without_a_host_is_named_with_its_slice() -> None:
    cluster = InprocCluster(random_table(1, num_slices=2))
    dispatcher = cluster.dispatcher()
    dispatcher.switch(RoutingTable(epoch=2, replicas={(0, 7): ()}, num_slices=2), {})
    x_TD, _, scores_TK = random_batch(1, 1)
    with pytest.raises(UnavailableError, match=r"serves expert 3\.") as caught:
        dispatcher.dispatch(0, x_TD, torch.tensor([[3]]), scores_TK)
    assert caught.value.metadata["expert"] in ("3.0", "3.1")


def test_a_batch_larger_than_a_frame_is_cut_into_frames() -> None:
    cluster = InprocCluster(random_table(3), limits=LinkLimits(max_rows=5))
    dispatcher = cluster.dispatcher()
    run(dispatcher, num_tokens=64, num_slots=2)
    assert sum(dispatcher.stats().frames_out.values()) >= 128 / 5


@pytest.mark.parametrize("seed", range(8))
def test_doubled_swapped_and_late_frames_change_nothing(seed: int) -> None:
    faults = Faults(seed=seed, duplicate=0.4, reorder=0.5, delay=0.5, delay_s=0.003)
    cluster = InprocCluster(random_table(4), limits=LinkLimits(max_rows=4, credit=64))
    dispatcher = cluster.dispatcher(to_host=faults, to_worker=faults)
    for step in range(6):
        dispatcher.begin_step(step)
        run(dispatcher, layer=step % 3, num_slots=2, seed=step)
    assert dispatcher.stats().late_replies > 0
    assert dispatcher.stats().resent_rows == 0


def test_two_microbatches_in_flight_get_their_own_rows() -> None:
    dispatcher = InprocCluster(random_table(4)).dispatcher()
    first, second = random_batch(9, 2, seed=1), random_batch(5, 1, seed=2)
    in_flight = [dispatcher.dispatch(0, *first), dispatcher.dispatch(1, *second, microbatch=1)]
    assert torch.equal(dispatcher.combine(in_flight[1]), direct(1, *second))
    assert torch.equal(dispatcher.combine(in_flight[0]), direct(0, *first))


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_killed_host_with_a_replica_costs_nothing(moment: str) -> None:
    cluster = InprocCluster(random_table(3, num_replicas=2))
    dispatcher = cluster.dispatcher()
    batch = random_batch(64, 2)
    if moment == "before":
        cluster.ends["worker-0", "host-1"].abort()
    in_flight = dispatcher.dispatch(0, *batch)
    cluster.ends["worker-0", "host-1"].abort()
    assert torch.equal(dispatcher.combine(in_flight), direct(0, *batch))
    assert dispatcher.table.hosts == {"host-0", "host-2"}
    assert dispatcher.stats().lost_hosts == {"LINK_DOWN": 1}
    run(dispatcher, layer=2)


def test_a_killed_host_without_a_replica_is_an_error_and_never_a_skipped_expert() -> None:
    cluster = InprocCluster(random_table(3))
    dispatcher = cluster.dispatcher()
    in_flight = dispatcher.dispatch(0, *random_batch(64, 2))
    cluster.ends["worker-0", "host-1"].abort()
    with pytest.raises(UnavailableError) as caught:
        dispatcher.combine(in_flight)
    assert caught.value.reason == "EXPERT_UNREACHABLE"
    with pytest.raises(UnavailableError):
        dispatcher.combine(dispatcher.dispatch(0, *random_batch(64, 2)))
    held = [expert for expert in range(NUM_EXPERTS) if dispatcher.table.replicas[0, expert]]
    x_TD, experts_TK, scores_TK = random_batch(8, 1)
    batch = (x_TD, torch.tensor(held)[experts_TK % len(held)], scores_TK)
    assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch)), direct(0, *batch))


def test_frames_that_never_arrive_end_in_a_deadline_and_then_a_replica() -> None:
    cluster = InprocCluster(random_table(2, num_replicas=2))
    dispatcher = cluster.dispatcher()
    started = cluster.clock.now
    batch = random_batch(16, 1)
    links = dispatcher._exchange.links
    links["host-0"]._faults = Faults(drop=1.0)  # type: ignore[attr-defined]
    assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch)), direct(0, *batch))
    waited_s = cluster.clock.now - started
    assert DEADLINES.unknown_hedge_s <= waited_s < DEADLINES.unknown_hedge_s + 0.01
    assert dispatcher.stats().hedged_rows > 0
    assert not dispatcher.stats().lost_hosts
    cluster.clock.now += DEADLINES.unknown_lose_s
    dispatcher.begin_step(1)
    assert dispatcher.stats().lost_hosts == {"REPLY_TIMEOUT": 1}
    assert dispatcher.table.hosts == {"host-1"}


def test_when_nobody_ever_answers_the_wait_is_bounded() -> None:
    cluster = InprocCluster(random_table(2, num_replicas=2))
    dispatcher = cluster.dispatcher(to_worker=Faults(drop=1.0))
    started = cluster.clock.now
    with pytest.raises(UnavailableError):
        dispatcher.combine(dispatcher.dispatch(0, *random_batch(16, 1)))
    assert cluster.clock.now - started < 2 * DEADLINES.unknown_lose_s + 1.0


def test_a_refused_expert_goes_to_another_replica_and_the_link_stays() -> None:
    cluster = InprocCluster(random_table(2, num_replicas=2))
    cluster.experts["host-0"].held.remove((0, 3))
    dispatcher = cluster.dispatcher()
    x_TD, _, scores_TK = random_batch(16, 1)
    batch = (x_TD, torch.arange(16)[:, None], scores_TK)
    table = RoutingTable(epoch=0, replicas={key: whole("host-0", "host-1") for key in cluster.table.replicas})
    dispatcher.switch(table, dispatcher._exchange.links)
    assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch)), direct(0, *batch))
    assert dispatcher.stats().refusals == {"WRONG_OWNER": 1}
    assert dispatcher.table.hosts == {"host-0", "host-1"}
    assert [call for call in cluster.experts["host-1"].calls if call[1] == ((3, 1),)]


def test_an_expert_refused_everywhere_is_unreachable() -> None:
    cluster = InprocCluster(random_table(2, num_replicas=2))
    for experts in cluster.experts.values():
        experts.held.clear()
    dispatcher = cluster.dispatcher()
    with pytest.raises(UnavailableError):
        dispatcher.combine(dispatcher.dispatch(0, *random_batch(16, 1)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_reply_that_is_not_finite_is_refused_and_asked_for_elsewhere(poison: float) -> None:
    cluster = InprocCluster(random_table(2, num_replicas=2))
    healthy = cluster.experts["host-0"].__class__.__call__

    class Poisoned(ScalingExperts):
        def __call__(self, layer, groups, x_RD, out_RD) -> None:
            healthy(self, layer, groups, x_RD, out_RD)
            out_RD[0, 3] = poison

    cluster.experts["host-0"].__class__ = Poisoned
    dispatcher = cluster.dispatcher()
    run(dispatcher)
    assert set(dispatcher.stats().refusals) == {"REPLY_NOT_FINITE"}
    assert dispatcher.table.hosts == {"host-0", "host-1"}


def test_rows_that_were_never_finite_blame_no_host() -> None:
    dispatcher = InprocCluster(random_table(2, num_replicas=2)).dispatcher()
    x_TD, experts_TK, scores_TK = random_batch(16, 1)
    x_TD[5, 0] = float("nan")
    with pytest.raises(EngineError) as caught:
        dispatcher.combine(dispatcher.dispatch(0, x_TD, experts_TK, scores_TK))
    assert caught.value.reason == "ROWS_NOT_FINITE"
    assert not dispatcher.stats().lost_hosts
    run(dispatcher)


def test_a_host_that_fails_to_compute_refuses_and_lives() -> None:
    cluster = InprocCluster(random_table(2, num_replicas=2))

    class OutOfMemory(ScalingExperts):
        def __call__(self, layer, groups, x_RD, out_RD) -> None:
            raise RuntimeError("out of memory")

    cluster.experts["host-1"].__class__ = OutOfMemory
    dispatcher = cluster.dispatcher()
    run(dispatcher, num_tokens=64)
    assert set(dispatcher.stats().refusals) == {"COMPUTE_FAILED"}


def test_a_failed_step_leaves_nothing_behind() -> None:
    cluster = InprocCluster(random_table(3))
    dispatcher = cluster.dispatcher()
    dispatcher.dispatch(0, *random_batch(9, 1))  # the engine failed before it could combine
    with pytest.raises(ValueError, match="in flight"):
        dispatcher.switch(cluster.table, dispatcher._exchange.links)
    dispatcher.begin_step(1)
    run(dispatcher)
    assert dispatcher.stats().late_replies > 0
    dispatcher.switch(cluster.table, dispatcher._exchange.links)
    run(dispatcher)


def test_a_link_to_another_life_of_a_host_is_refused() -> None:
    dispatcher = InprocCluster(random_table(1)).dispatcher()
    table = RoutingTable(
        epoch=2,
        replicas={(0, 0): (Replica("host-0", 1),)},
    )
    with pytest.raises(ValueError, match="incarnation"):
        dispatcher.switch(table, dispatcher._exchange.links)


def test_statistics_count_rows_per_host_and_expert() -> None:
    cluster = InprocCluster(random_table(2))
    dispatcher = cluster.dispatcher()
    x_TD, experts_TK, scores_TK = random_batch(32, 2)
    dispatcher.combine(dispatcher.dispatch(1, x_TD, experts_TK, scores_TK))
    stats = dispatcher.stats()
    assert sum(stats.rows_out.values()) == sum(stats.rows_in.values()) == 64
    assert sum(stats.bytes_out.values()) == 64 * WIDTH * 4
    counted = sum((server.stats().rows_by_expert for server in cluster.servers.values()), Counter())
    assert counted == Counter((1, expert) for expert in experts_TK.flatten().tolist())


def test_memory_a_link_still_reads_is_not_filled_again() -> None:
    cluster = InprocCluster(random_table(1))
    dispatcher = cluster.dispatcher()
    first = dispatcher.dispatch(0, *random_batch(8, 1))
    dispatcher.combine(first)
    second = dispatcher.dispatch(0, *random_batch(8, 1))
    assert second.rows_ND.data_ptr() == first.rows_ND.data_ptr()
    cluster.ends["worker-0", "host-0"]._free_slots.popleft()  # a frame the host has not let go of
    dispatcher.combine(second)
    third = dispatcher.dispatch(0, *random_batch(8, 1))
    assert third.rows_ND.data_ptr() != second.rows_ND.data_ptr()


def test_a_wrong_shape_is_refused() -> None:
    dispatcher = InprocCluster(random_table(1)).dispatcher()
    x_TD, experts_TK, scores_TK = random_batch(4, 1)
    for wrong in (
        (x_TD[:, :4], experts_TK, scores_TK),
        (x_TD.double(), experts_TK, scores_TK),
        (x_TD, experts_TK, scores_TK[:3]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            dispatcher.dispatch(0, *wrong)
