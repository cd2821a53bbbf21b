"""Links over real sockets: exact results, no copy, no allocation, no waiting for the wrong peer."""

import os
import signal
import socket
import time
import tracemalloc
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.links.address import bind, parse_address
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import FrameHeader, FrameKind, LinkLimits
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.dispatch.reply_times import Deadlines
from llama4_dist.errors import HandshakeError, LinkDownError, UnavailableError
from tests.dispatch.fakes import WIDTH, ScalingExperts, direct, held_by, random_batch, random_table
from tests.dispatch.servers import LIMITS, SECRET, ServerThread, dispatcher, hello, serve


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_hosts", [1, 4, 16])
def test_combine_undoes_dispatch(num_hosts: int, dtype: torch.dtype, transport: str, tmp_path: Path) -> None:
    table = random_table(num_hosts)
    with serve(table, tmp_path, transport=transport, dtype=dtype) as servers:
        worker = dispatcher(table, servers)
        for num_tokens in (0, 1, 7, 64, 300):
            for num_slots in (1, 2):
                x_TD, experts_TK, scores_TK = random_batch(num_tokens, num_slots, dtype=dtype)
                y_TD = worker.combine(worker.dispatch(1, x_TD, experts_TK, scores_TK))
                assert torch.equal(y_TD, direct(1, x_TD, experts_TK, scores_TK))
        worker.close()


def test_a_large_share_leaves_in_parts_and_no_expert_is_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama4_dist.dispatch.dispatcher.PART_BYTES", 8 * WIDTH * 4)
    table = random_table(1)
    with serve(table, tmp_path) as servers:
        worker = dispatcher(table, servers)
        batch = random_batch(24, 2)
        assert torch.equal(worker.combine(worker.dispatch(1, *batch)), direct(1, *batch))
        assert 4 <= worker.stats().frames_out["host-0"] <= 6
        assert sum(worker.stats().rows_out.values()) == 48
        compute = servers["host-0"].compute
        assert isinstance(compute, ScalingExperts)
        computed = [expert for _, groups in compute.calls for expert, _ in groups]
        assert len(computed) == len(set(computed))
        worker.close()


def test_a_host_killed_between_dispatch_and_combine_costs_nothing(tmp_path: Path) -> None:
    table = random_table(3, num_replicas=2)
    with serve(table, tmp_path) as servers:
        worker = dispatcher(table, servers)
        for lost in ("host-1", None):
            batch = random_batch(64, 2)
            in_flight = worker.dispatch(0, *batch)
            if lost:
                servers[lost].stop()
            assert torch.equal(worker.combine(in_flight), direct(0, *batch))
        assert worker.table.hosts == {"host-0", "host-2"}
        worker.close()


def test_a_host_killed_without_replica_is_an_error_at_once(tmp_path: Path) -> None:
    table = random_table(2)
    with serve(table, tmp_path) as servers:
        worker = dispatcher(table, servers)
        servers["host-1"].stop()
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            worker.combine(worker.dispatch(0, *random_batch(64, 1)))
        assert time.monotonic() - started < 1.0
        worker.close()


def _run_host(directory: str, ready: Connection) -> None:
    server = ServerThread(
        "host-1", ScalingExperts(held_by(random_table(2, num_replicas=2), "host-1")), [f"unix:{directory}/links/p"]
    )
    ready.send(server.addresses[0])
    ready.recv()
    server.stop()


def test_a_stopped_process_does_not_hold_up_rows_for_other_hosts(tmp_path: Path) -> None:
    """Its socket stays open and takes nothing: only a deadline of ours can tell."""
    table = random_table(2, num_replicas=2)
    context = get_context("spawn")
    ready, child_end = context.Pipe()
    child = context.Process(target=_run_host, args=(str(tmp_path), child_end), daemon=True)
    child.start()
    address = ready.recv()
    other = ServerThread("host-0", ScalingExperts(held_by(table, "host-0")), [f"unix:{tmp_path}/links/t"])
    try:
        links = {
            "host-0": other.connect(),
            "host-1": connect(address, hello=hello(), secret=SECRET, limits=LIMITS, timeout_s=5.0),
        }
        worker = Dispatcher(
            worker="worker-0",
            incarnation=0,
            table=table,
            links=links,
            width=WIDTH,
            dtype=torch.float32,
            deadlines=Deadlines(lose_floor_s=0.3, unknown_lose_s=0.3),
        )
        batch = random_batch(2000, 2)
        assert torch.equal(worker.combine(worker.dispatch(0, *batch)), direct(0, *batch))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        started = time.monotonic()
        in_flight = worker.dispatch(0, *batch)
        assert time.monotonic() - started < 0.25, "posting waited for a stopped host"
        assert torch.equal(worker.combine(in_flight), direct(0, *batch))
        assert worker.stats().hedged_rows > 0, "a replica answered before the stopped host was given up"
        while not worker.stats().lost_hosts:
            assert time.monotonic() - started < 5.0
            worker.begin_step(1)
        assert worker.stats().lost_hosts == {"REPLY_TIMEOUT": 1}
        worker.close()
    finally:
        child.kill()
        child.join()
        other.stop()


def test_frames_beyond_the_peers_credit_wait_here(tmp_path: Path) -> None:
    with serve(random_table(1), tmp_path) as servers:
        link = servers["host-0"].connect()
        rows_RD = torch.ones(1, WIDTH)
        for number in range(1, 20):
            link.post(FrameHeader(FrameKind.ROWS, number, 0, 0, 0, 1, ((0, 1),)), rows_RD)
        assert link.num_unsent == 19 - LIMITS.credit
        numbers: list[int] = []
        while len(numbers) < 19:
            for frame in link.poll(5.0):
                numbers.append(frame.header.number)
                frame.release()
        assert numbers == list(range(1, 20))
        assert not servers["host-0"].server.stats().closed_links
        link.abort()


def test_rows_are_received_into_the_same_memory_for_ever(tmp_path: Path) -> None:
    with serve(random_table(1), tmp_path) as servers:
        link = servers["host-0"].connect()
        rows_RD = torch.randn(64, WIDTH)
        addresses = set()
        for number in range(1, 200):
            link.post(FrameHeader(FrameKind.ROWS, number, 0, 0, 0, 64, ((0, 64),)), rows_RD)
            (frame,) = link.poll(5.0)
            assert frame.rows_RD is not None
            addresses.add(frame.rows_RD.data_ptr())
            assert frame.rows_RD.data_ptr() % 64 == 0
            frame.release()
        assert len(addresses) <= LIMITS.credit
        link.abort()


SHARING = replace(LIMITS, shared_from_bytes=1)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("limits", [LIMITS, SHARING], ids=["travelling", "shared"])
def test_the_steady_state_takes_no_memory(tmp_path: Path, limits: LinkLimits) -> None:
    """What torch allocates, which tracemalloc does not see: the answer of a dispatch, which its caller lets go."""
    table = random_table(2)
    with serve(table, tmp_path, limits=limits) as servers:
        worker = dispatcher(table, servers)
        batch = random_batch(64, 2)

        def steps(count: int) -> None:
            for step in range(count):
                worker.begin_step(step)
                flights = [worker.dispatch(0, *batch, microbatch=index) for index in range(2)]
                for flight in flights:
                    worker.combine(flight)

        steps(200)
        before = resident_bytes()
        steps(1000)
        after = resident_bytes()
        worker.close()
    assert after - before < 256 * 1024  # less than the rows of two steps


@pytest.mark.parametrize("limits", [LIMITS, SHARING], ids=["travelling", "shared"])
def test_the_steady_state_allocates_nothing_that_stays(tmp_path: Path, limits: LinkLimits) -> None:
    table = random_table(2)
    with serve(table, tmp_path, limits=limits) as servers:
        worker = dispatcher(table, servers)
        batch = random_batch(32, 2)

        def steps(count: int) -> None:
            for step in range(count):
                worker.begin_step(step)
                worker.combine(worker.dispatch(0, *batch))

        steps(50)
        tracemalloc.start()
        steps(100)
        before = tracemalloc.get_traced_memory()[0]
        steps(1000)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        worker.close()
    # Python keeps up to 2000 freed tuples of a size for reuse (0.2 MB); what else stays is below 50 bytes a step.
    assert after - before < 256 * 1024
    assert peak - before < 320 * 1024


def test_dispatch_reuses_its_send_memory(tmp_path: Path) -> None:
    table = random_table(2)
    with serve(table, tmp_path) as servers:
        worker = dispatcher(table, servers)
        addresses = set()
        for _ in range(50):
            in_flight = worker.dispatch(0, *random_batch(32, 2))
            addresses.add(in_flight.rows_ND.data_ptr())
            worker.combine(in_flight)
        worker.close()
    assert len(addresses) == 1


def test_connecting_to_nobody_or_to_a_mute_says_so(tmp_path: Path) -> None:
    with pytest.raises(LinkDownError, match="no link to"):
        connect(f"unix:{tmp_path}/nobody", hello=hello(), secret=SECRET, limits=LIMITS, timeout_s=0.3)
    mute = bind("tcp:127.0.0.1:0", 1)
    started = time.monotonic()
    with pytest.raises(LinkDownError, match="timed out"):
        connect(f"tcp:127.0.0.1:{mute.getsockname()[1]}", hello=hello(), secret=SECRET, limits=LIMITS, timeout_s=0.3)
    assert time.monotonic() - started < 1.0
    mute.close()


def test_a_host_that_does_not_know_the_secret_is_not_believed(tmp_path: Path) -> None:
    with serve(random_table(1), tmp_path) as servers, pytest.raises(HandshakeError):
        connect(servers["host-0"].addresses[0], hello=hello(), secret=b"y" * 32, limits=LIMITS, timeout_s=2.0)


@pytest.mark.parametrize("address", ["tcp:0.0.0.0:0", "tcp:[::]:0"])
def test_every_interface_at_once_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="every interface"):
        Listener(address, secret=SECRET)


@pytest.mark.parametrize(
    "address", ["", "unix:", "unix:relative", "tcp:host", "tcp::1", "tcp:h:70000", "http://x", "unix:/" + "a" * 107]
)
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ValueError):
        parse_address(address)


def test_a_short_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="secret"):
        Listener(f"unix:{tmp_path}/links/a", secret=b"short")


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="0700"):
        Listener(f"unix:{tmp_path}/open/a", secret=SECRET)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    directory = tmp_path / "links"
    directory.mkdir(mode=0o700)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(directory / "a"))
    stale.close()
    live = Listener(f"unix:{directory}/a", secret=SECRET)
    with pytest.raises(ValueError, match="already listens"):
        Listener(f"unix:{directory}/a", secret=SECRET)
    live.close()
    assert not (directory / "a").exists()
