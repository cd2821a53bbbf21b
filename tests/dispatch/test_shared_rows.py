"""Rows in memory that two processes share: exact results, nothing read outside of it, nothing left of it."""

import fcntl
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.frame import FrameRules, Place, decode, decode_prefix, encode
from llama4_dist.dispatch.handshake import WorkerHandshake
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import FrameHeader, FrameKind
from llama4_dist.dispatch.links.shared_rows import MEMORIES, SharedRows, close_all, make_memories
from llama4_dist.errors import FrameError, HandshakeError, UnavailableError
from tests.dispatch.fakes import (
    NUM_EXPERTS,
    NUM_LAYERS,
    WIDTH,
    ScalingExperts,
    direct,
    held_by,
    random_batch,
    random_table,
)
from tests.dispatch.raw_client import RawClient
from tests.dispatch.servers import LIMITS, SECRET, ServerThread, dispatcher, hello, serve
from tests.waiting import wait_until

LARGE = 8 * WIDTH * 4  # eight rows
SHARING = replace(LIMITS, shared_from_bytes=LARGE)
RULES = FrameRules(
    width=WIDTH,
    dtype=torch.float32,
    num_layers=NUM_LAYERS,
    num_experts=NUM_EXPERTS,
    max_rows=LIMITS.max_rows,
    max_header_bytes=4096,
)


def open_memories() -> int:
    """How many memories to share this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:llama4_dist_rows")


@pytest.mark.parametrize(("transport", "is_shared"), [("unix", True), ("tcp", False)])
def test_large_rows_lie_in_shared_memory_and_small_ones_travel(transport: str, is_shared: bool, tmp_path: Path) -> None:
    table, before = random_table(1), open_memories()
    with serve(table, tmp_path, transport=transport, limits=SHARING) as servers:
        worker = dispatcher(table, servers)
        num_large_bytes = 0
        for num_tokens in (1, 7, 8, 64, 300, 8, 3, 64) * 4:
            batch = random_batch(num_tokens, 1, seed=num_tokens)
            assert torch.equal(worker.combine(worker.dispatch(1, *batch)), direct(1, *batch))
            num_large_bytes += num_tokens * WIDTH * 4 if num_tokens in (8, 64) else 0
        stats = worker.links["host-0"].stats()
        if is_shared:
            assert open_memories() > before
            # 300 rows are five frames; the fifth waits for its turn, and then travels. All answers are shared.
            assert stats.shared_bytes_out == num_large_bytes + 4 * 256 * WIDTH * 4
            assert stats.shared_bytes_in == num_large_bytes + 4 * 300 * WIDTH * 4
        else:
            assert stats.shared_bytes_out == stats.shared_bytes_in == 0
        worker.close()
    assert open_memories() == before


def test_two_dispatches_in_flight_do_not_share_a_slot(tmp_path: Path) -> None:
    table = random_table(2)
    with serve(table, tmp_path, limits=SHARING) as servers:
        worker = dispatcher(table, servers)
        for step in range(20):
            worker.begin_step(step)
            batches = [random_batch(40, 1, seed=2 * step + index) for index in range(2)]
            flights = [worker.dispatch(0, *batch, microbatch=index) for index, batch in enumerate(batches)]
            for flight, batch in zip(flights, batches, strict=True):
                assert torch.equal(worker.combine(flight), direct(0, *batch))
        assert worker.links["host-0"].stats().shared_bytes_in > 0
        worker.close()


def test_where_no_slot_is_free_rows_travel() -> None:
    memories = make_memories(RULES, 2)
    worker = SharedRows(memories, RULES, 2, initiator=True)
    host = SharedRows(memories, RULES, 2, initiator=False)
    close_all(memories)
    rows_RD = torch.randn(8, WIDTH)
    offsets = [worker.copy_in(number, rows_RD) for number in range(3)]
    assert offsets[2] == -1
    assert offsets[0] != offsets[1]
    assert torch.equal(host.rows_at(offsets[1], 8), rows_RD)
    worker.answered(1)
    assert worker.copy_in(3, rows_RD) == offsets[1]


def test_a_reply_keeps_its_memory_until_the_worker_says_it_was_read() -> None:
    memories = make_memories(RULES, 1)
    host = SharedRows(memories, RULES, 1, initiator=False)
    close_all(memories)
    replies = [host.take(4), host.take(4)]
    assert None not in replies
    assert host.take(4) is None
    offsets = [host.post(reply) for reply in replies if reply is not None]
    assert host.post(torch.zeros(4, WIDTH)) == -1
    assert host.take(4) is None
    host.acknowledge(1)
    again = host.take(4)
    assert again is not None
    assert host.post(again) == offsets[0]
    with pytest.raises(FrameError, match="read 4 replies"):
        host.acknowledge(4)
    with pytest.raises(FrameError, match="read 0 replies"):
        host.acknowledge(0)


def test_what_was_taken_and_not_posted_is_free_again() -> None:
    memories = make_memories(RULES, 1)
    host = SharedRows(memories, RULES, 1, initiator=False)
    close_all(memories)
    for _ in range(5):
        assert host.take(4) is not None
        host.give_back()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (Place(64 * 15 + 1, 0), "PLACE_RANGE"),
        (Place(1 << 40, 0), "PLACE_RANGE"),
        (Place(1024 - 64, 0), "PLACE_RANGE"),
        (Place(-64, 0), "PLACE_RANGE"),
        (Place(0, -1), "PLACE_RANGE"),
    ],
)
def test_rows_outside_of_the_memory_are_refused(place: Place, reason: str) -> None:
    rules = replace(RULES, num_shared_bytes=1024)
    header = FrameHeader(FrameKind.REPLY, 1, 0, 0, 0, 3)
    frame = encode(header, memoryview(b""), 0, rules, place)
    with pytest.raises(FrameError) as refused:
        decode(memoryview(frame), decode_prefix(memoryview(frame), rules), 0, rules)
    assert refused.value.reason == reason


def test_shared_rows_are_refused_where_nothing_is_shared() -> None:
    frame = encode(FrameHeader(FrameKind.REPLY, 1, 0, 0, 0, 3), memoryview(b""), 0, RULES, Place(0, 0))
    with pytest.raises(FrameError) as refused:
        decode_prefix(memoryview(frame), RULES)
    assert refused.value.reason == "FLAGS_UNKNOWN"


def unsealed() -> list[int]:
    descriptors = [os.memfd_create("llama4_dist_rows") for _ in range(2)]
    for descriptor, source in zip(descriptors, make_memories(RULES, LIMITS.credit), strict=True):
        os.ftruncate(descriptor, os.fstat(source).st_size)
        os.close(source)
    return descriptors


def too_small() -> list[int]:
    return make_memories(replace(RULES, max_rows=1), 1)


def no_memories() -> list[int]:
    return [os.open("/dev/null", os.O_RDWR) for _ in range(2)]


def only_one() -> list[int]:
    first, second = make_memories(RULES, LIMITS.credit)
    os.close(second)
    return [first]


@pytest.mark.parametrize("make", [unsealed, too_small, no_memories, only_one])
def test_other_memories_than_agreed_are_refused_and_closed(make: Callable[[], list[int]], tmp_path: Path) -> None:
    table = random_table(1)
    with serve(table, tmp_path, limits=SHARING) as servers:
        before = len(os.listdir("/proc/self/fd"))
        client = RawClient(servers["host-0"].addresses[0])
        handshake = WorkerHandshake(hello("mallory"), SHARING, SECRET, may_share=True)
        client.socket.sendall(handshake.greeting())
        client.socket.sendall(handshake.prove(client._read(handshake.GREETING_BYTES)))
        prefix = client._read(handshake.ANSWER_PREFIX_BYTES)
        assert handshake.finish(prefix, client._read(handshake.answer_len(prefix))).shares
        memories = make()
        socket.send_fds(client.socket, [MEMORIES], memories)
        close_all(memories)
        assert client.closed_within(3.0)
        client.close()
        closed = servers["host-0"].server.stats().closed_links
        wait_until(lambda: closed["SHARED_MEMORY_WRONG"] == 1, lambda: closed)
        assert len(os.listdir("/proc/self/fd")) == before


def test_where_no_memory_is_to_be_had_rows_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> list[int]:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("llama4_dist.dispatch.links.connect.make_memories", refuse)
    table = random_table(1)
    with serve(table, tmp_path, limits=SHARING) as servers:
        worker = dispatcher(table, servers)
        batch = random_batch(64, 1)
        for _ in range(3):
            assert torch.equal(worker.combine(worker.dispatch(1, *batch)), direct(1, *batch))
        assert worker.links["host-0"].stats().shared_bytes_out == 0
        worker.close()


def test_a_memory_cannot_shrink_while_it_is_read() -> None:
    memories = make_memories(RULES, 1)
    with pytest.raises(PermissionError):
        os.ftruncate(memories[0], 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memories[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(HandshakeError, match="bytes instead of"):
        SharedRows(memories, replace(RULES, max_rows=1000), 1, initiator=True)
    close_all(memories)


def run_host(address: str, ready: Connection) -> None:
    table = random_table(1)
    server = ServerThread("host-0", ScalingExperts(held_by(table, "host-0")), [address], limits=SHARING)
    ready.send(None)
    server._thread.join()


def test_a_killed_host_leaves_no_memory_and_costs_an_error_only(tmp_path: Path) -> None:
    context, before = get_context("spawn"), open_memories()
    ready, childs_end = context.Pipe()
    address = f"unix:{tmp_path}/links/host-0"
    process = context.Process(target=run_host, args=(address, childs_end), daemon=True)
    process.start()
    ready.recv()
    table = random_table(1)
    link = connect(address, hello=hello(), secret=SECRET, limits=SHARING, timeout_s=5.0)
    worker = Dispatcher(
        worker="worker-0", incarnation=0, table=table, links={"host-0": link}, width=WIDTH, dtype=torch.float32
    )
    batch = random_batch(64, 1)
    assert torch.equal(worker.combine(worker.dispatch(0, *batch)), direct(0, *batch))
    assert link.stats().shared_bytes_in > 0
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(UnavailableError):
        worker.combine(worker.dispatch(0, *batch))
    worker.close()
    assert open_memories() == before
