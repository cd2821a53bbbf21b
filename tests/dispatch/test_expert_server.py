"""The expert host: pooling, refusing, and one worker never being the trouble of another."""

import threading
import time
from pathlib import Path

import pytest
import torch

from llama4_dist.dispatch.links.link import FrameHeader, FrameKind, LinkLimits
from llama4_dist.dispatch.pool import plan_pool
from llama4_dist.errors import HandshakeError, LinkDownError
from tests.dispatch.fakes import WIDTH, InprocCluster, ScalingExperts, direct, held_by, random_batch, random_table
from tests.dispatch.servers import LIMITS, ServerThread, dispatcher, serve


def test_rows_of_two_workers_share_one_computation_and_each_gets_its_own_back() -> None:
    cluster = InprocCluster(random_table(1))
    workers = [cluster.dispatcher(f"worker-{index}") for index in range(3)]
    batches = [random_batch(8 + index, 2, seed=index) for index in range(3)]
    in_flight = [worker.dispatch(1, *batch) for worker, batch in zip(workers, batches, strict=True)]
    for worker, flight, batch in zip(workers, in_flight, batches, strict=True):
        assert torch.equal(worker.combine(flight), direct(1, *batch))
    (call,) = cluster.experts["host-0"].calls
    assert sum(count for _, count in call[1]) == 2 * (8 + 9 + 10)
    stats = cluster.servers["host-0"].stats()
    assert stats.rows_by_worker == {"worker-0": 16, "worker-1": 18, "worker-2": 20}
    assert (stats.computations, stats.pooled_frames) == (1, 3)


def test_a_pool_is_never_larger_than_a_frame_may_be() -> None:
    cluster = InprocCluster(random_table(1), limits=LinkLimits(max_rows=16))
    workers = [cluster.dispatcher(f"worker-{index}") for index in range(4)]
    batches = [random_batch(10, 1, seed=index) for index in range(4)]
    in_flight = [worker.dispatch(0, *batch) for worker, batch in zip(workers, batches, strict=True)]
    for worker, flight, batch in zip(workers, in_flight, batches, strict=True):
        assert torch.equal(worker.combine(flight), direct(0, *batch))
    assert [sum(count for _, count in call[1]) for call in cluster.experts["host-0"].calls] == [10] * 4


def test_layers_are_computed_apart_and_in_the_order_they_came() -> None:
    cluster = InprocCluster(random_table(1))
    workers = [cluster.dispatcher(f"worker-{index}") for index in range(2)]
    batch = random_batch(4, 1)
    in_flight = [workers[0].dispatch(2, *batch), workers[1].dispatch(0, *batch)]
    assert torch.equal(workers[1].combine(in_flight[1]), direct(0, *batch))
    assert torch.equal(workers[0].combine(in_flight[0]), direct(2, *batch))
    assert [layer for layer, _ in cluster.experts["host-0"].calls] == [2, 0]


def test_one_frame_alone_is_computed_where_it_lies() -> None:
    seen = []

    class Recording(ScalingExperts):
        def __call__(self, layer, groups, x_RD, out_RD) -> None:
            seen.append(x_RD.data_ptr())
            super().__call__(layer, groups, x_RD, out_RD)

    cluster = InprocCluster(random_table(1))
    cluster.experts["host-0"].__class__ = Recording
    worker = cluster.dispatcher()
    in_flight = worker.dispatch(0, *random_batch(4, 1))
    worker.combine(in_flight)
    assert seen == [in_flight.rows_ND.data_ptr()]


def test_the_window_waits_for_the_other_workers_and_not_for_ever(tmp_path: Path) -> None:
    table = random_table(1)
    experts = ScalingExperts(held_by(table, "host-0"))
    server = ServerThread("host-0", experts, [f"unix:{tmp_path}/links/a"], pool_window_s=0.2)
    try:
        first, second = (dispatcher(table, {"host-0": server}, f"worker-{index}") for index in range(2))
        batch = random_batch(4, 1)
        started = time.monotonic()
        in_flight = [first.dispatch(0, *batch), second.dispatch(0, *batch)]
        for worker, flight in zip((first, second), in_flight, strict=True):
            assert torch.equal(worker.combine(flight), direct(0, *batch))
        assert len(experts.calls) == 1  # pooled, and at once: nobody else is connected
        assert time.monotonic() - started < 0.15
        started = time.monotonic()
        first.combine(first.dispatch(0, *batch))  # the other worker sends nothing
        assert 0.19 < time.monotonic() - started < 2.0
        second.close()
        first.combine(first.dispatch(0, *batch))
        started = time.monotonic()
        first.combine(first.dispatch(0, *batch))  # alone again: no window
        assert time.monotonic() - started < 0.15
    finally:
        server.stop()


def test_plan_pool_merges_by_expert_and_keeps_the_order_of_frames() -> None:
    plan = plan_pool([((1, 2), (3, 1)), ((0, 1), (1, 3))])
    assert plan.groups == ((0, 1), (1, 5), (3, 1))
    assert [tuple(run) for run in plan.runs] == [(1, 0, 0, 1), (0, 0, 1, 2), (1, 1, 3, 3), (0, 2, 6, 1)]
    assert plan.num_rows == 7


def test_a_worker_that_reads_no_replies_is_dropped_and_others_go_on(tmp_path: Path) -> None:
    table = random_table(1)
    with serve(table, tmp_path) as servers:
        server = servers["host-0"]
        healthy = dispatcher(table, servers, "healthy")
        deaf = server.connect("deaf")
        rows_RD = torch.zeros(64, WIDTH)
        header = FrameHeader(FrameKind.ROWS, 1, 0, 0, 0, 64, ((0, 64),))
        deaf._initiator = False  # it ignores the credit and never polls

        def flood() -> None:
            for number in range(20000):
                deaf.post(header._replace(number=number), rows_RD)
                if number % 50 == 0:
                    batch = random_batch(4, 1)
                    assert torch.equal(healthy.combine(healthy.dispatch(0, *batch)), direct(0, *batch))

        with pytest.raises(LinkDownError):
            flood()
        assert set(server.server.stats().closed_links) <= {"CREDIT_EXCEEDED", "REPLIES_UNREAD"}
        assert server.is_alive
        healthy.close()
        deaf.abort()


def test_replies_nobody_reads_are_bounded() -> None:
    server = InprocCluster(random_table(1)).servers["host-0"]
    link = server.open_inproc(worker="deaf", incarnation=0)
    for number in range(1, 2 * server.limits.credit + 1):
        link.post(FrameHeader(FrameKind.ROWS, number, 0, 0, 0, 1, ((0, 1),)), torch.zeros(1, WIDTH))
        server.poll(0.0)
    assert server.stats().links == 1
    link.post(FrameHeader(FrameKind.ROWS, 99, 0, 0, 0, 1, ((0, 1),)), torch.zeros(1, WIDTH))
    server.poll(0.0)
    assert server.stats().closed_links == {"REPLIES_UNREAD": 1}
    assert server.stats().links == 0


def test_one_worker_has_one_link_and_its_new_life_replaces_the_old(tmp_path: Path) -> None:
    table = random_table(1)
    with serve(table, tmp_path) as servers:
        server = servers["host-0"]
        first = server.connect("worker-0", incarnation=1)
        for incarnation, reason in ((1, "DUPLICATE_PEER"), (0, "STALE_INCARNATION")):
            with pytest.raises(HandshakeError) as caught:
                server.connect("worker-0", incarnation=incarnation)
            assert caught.value.reason == reason
        assert first.poll(0.0) == []  # the older one stays
        second = server.connect("worker-0", incarnation=2)
        with pytest.raises(LinkDownError):
            first.poll(5.0)
        second.abort()
        server.connect("worker-0", incarnation=2).abort()  # gone means free again
        assert server.server.stats().closed_links["SUPERSEDED"] == 1


def test_the_server_takes_no_more_workers_than_it_may(tmp_path: Path) -> None:
    limits = LinkLimits(max_rows=64, max_links=2)
    server = ServerThread("a", ScalingExperts(()), [f"unix:{tmp_path}/links/a"], limits=limits)
    try:
        links = [server.connect(f"worker-{index}") for index in range(2)]
        with pytest.raises(HandshakeError) as caught:
            server.connect("worker-2")
        assert caught.value.reason == "TOO_MANY_LINKS"
        for link in links:
            link.abort()
    finally:
        server.stop()


def test_the_server_stops_at_once_and_its_workers_notice(tmp_path: Path) -> None:
    with serve(random_table(1), tmp_path) as servers:
        link = servers["host-0"].connect()
        started = time.monotonic()
        servers["host-0"].stop()
        assert time.monotonic() - started < 0.5
        with pytest.raises(LinkDownError):
            link.poll(5.0)
        link.abort()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("host-")]
    assert not list((tmp_path / "links").iterdir())


def test_limits_are_the_smaller_of_both_sides(tmp_path: Path) -> None:
    with serve(random_table(1), tmp_path) as servers:
        link = servers["host-0"].connect()
        assert link.limits.max_rows == LIMITS.max_rows
        link.abort()
