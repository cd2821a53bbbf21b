"""Every malformed frame and handshake against a real server, while an honest worker goes on with exact results.

The ids are those of the frame cases of the project's threat list. Cases about routing epochs (a frame carries none: a
host is a pure function, and its own incarnation is fenced by the handshake), shared memory (no such link) and request
heartbeats have no counterpart here.
"""

import pickle
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import psutil
import pytest
import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.errors import HandshakeError
from tests.dispatch.fakes import WIDTH, direct, random_batch, random_table
from tests.dispatch.raw_client import BFLOAT16, NACK, REPLY, RawClient, fields, frame
from tests.dispatch.servers import LIMITS, ServerThread, dispatcher, hello, serve
from tests.waiting import wait_until


class Canary:
    """An honest worker that never stops, and remembers when a result was not exact."""

    def __init__(self, worker: Dispatcher) -> None:
        self.rounds = 0
        self.failure: BaseException | None = None
        self._worker = worker
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="canary")
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.002):
                batch = random_batch(9, 2, seed=self.rounds)
                y_TD = self._worker.combine(self._worker.dispatch(self.rounds % 3, *batch))
                assert torch.equal(y_TD, direct(self.rounds % 3, *batch))
                self.rounds += 1
        except BaseException as error:
            self.failure = error
            raise

    def check(self) -> None:
        """Wait for another exact round."""
        before, deadline = self.rounds, time.monotonic() + 5.0
        while self.rounds < before + 2 and time.monotonic() < deadline and self.failure is None:
            time.sleep(0.002)
        assert self.failure is None
        assert self.rounds >= before + 2

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        self._worker.close()


@dataclass
class Site:
    server: ServerThread
    canary: Canary


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    table = random_table(1)
    with serve(table, tmp_path_factory.mktemp("site")) as servers:
        canary = Canary(dispatcher(table, servers, "canary"))
        yield Site(servers["host-0"], canary)
        canary.stop()


@pytest.fixture
def expect_closed(site: Site) -> Iterator[Callable[[RawClient, str], None]]:
    """Check that a client is closed for one reason, counted once, and that the canary did not notice."""
    closed = site.server.server.stats().closed_links
    before = closed.copy()

    def check(client: RawClient, reason: str, seconds: float = 3.0) -> None:
        assert client.closed_within(seconds), "the server did not close"
        client.close()
        wait_until(lambda: offences(closed) != offences(before), "the server counts it")
        assert offences(closed) - offences(before) == {reason: 1}

    yield check
    assert site.server.is_alive
    site.canary.check()


def offences(closed: Counter[str]) -> Counter[str]:
    """Leave out honest goodbyes: those of an earlier test may be counted only now."""
    return Counter({reason: count for reason, count in closed.items() if reason != "LINK_DOWN"})


ROW_BYTES = WIDTH * 4
FRAMES = {
    "T01 magic": (frame(magic=b"HTTP"), "MAGIC_WRONG"),
    "T02 version older": (frame(version=0), "VERSION_UNKNOWN"),
    "T02 version newer": (frame(version=2), "VERSION_UNKNOWN"),
    "T03 header of length 0": (frame(header_len=0), "HEADER_LENGTH"),
    "T03 rows of length 0": (frame(payload=b""), "PAYLOAD_MISMATCH"),
    "T04 payload over the limit": (frame(payload_len=65 * ROW_BYTES), "PAYLOAD_LENGTH"),
    "T04 header over the limit": (frame(header_len=64 * 1024 + 1), "HEADER_LENGTH"),
    "T05 payload of 2^63": (frame(payload_len=1 << 63), "PAYLOAD_LENGTH"),
    "T06 header damaged": (frame(fields(step=9))[:60] + b"\xff" + frame(fields(step=9))[61:], "CHECKSUM_WRONG"),
    "T07 rows damaged": (frame()[:-1] + b"\x01", "CHECKSUM_WRONG"),
    "T07 checksum forged": (frame(checksum=1), "CHECKSUM_WRONG"),
    "T10 trailing bytes": (frame() + b"\0" * 64, "MAGIC_WRONG"),
    "T10 trailing header bytes": (frame(msgpack.packb(fields()) + b"\xc0"), "HEADER_NOT_MSGPACK"),
    "T10 padding used": (frame(padding=b"\x01"), "PADDING_NOT_ZERO"),
    "T11 kind unknown": (frame(kind=9), "KIND_UNKNOWN"),
    "T11 reply to a host": (frame(fields(groups=[]), kind=REPLY), "KIND_UNEXPECTED"),
    "T11 refusal to a host": (frame(fields(reason="X"), b"", kind=NACK), "KIND_UNEXPECTED"),
    "T12 dtype unknown": (frame(fields(dtype=77)), "DTYPE_UNEXPECTED"),
    "T12 dtype not agreed": (frame(fields(dtype=BFLOAT16)), "DTYPE_UNEXPECTED"),
    "T13 rows do not fill the payload": (frame(fields(num_rows=3, groups=[[0, 3]])), "PAYLOAD_MISMATCH"),
    "T13 payload of half a row": (frame(payload=bytes(ROW_BYTES + 8)), "PAYLOAD_MISMATCH"),
    "T14 shape overflow": (frame(fields(num_rows=1 << 32, width=1 << 32)), "WIDTH_UNEXPECTED"),
    "T14 integer beyond 63 bits": (frame(fields(num_rows=(1 << 64) - 1)), "FIELD_RANGE"),
    "T15 negative rows": (frame(fields(num_rows=-2)), "FIELD_RANGE"),
    "T15 no rows": (frame(fields(num_rows=0, groups=[[0, 0]]), b""), "ROWS_RANGE"),
    "T15 group of no rows": (frame(fields(groups=[[0, 0], [1, 2]])), "GROUPS_COUNT"),
    "T16 width of another model": (frame(fields(width=WIDTH * 2, num_rows=1, groups=[[0, 1]])), "WIDTH_UNEXPECTED"),
    "T17 more rows than agreed": (frame(fields(num_rows=65, groups=[[0, 65]])), "ROWS_RANGE"),
    "T18 layer the model lacks": (frame(fields(layer=3)), "LAYER_RANGE"),
    "T19 expert the model lacks": (frame(fields(groups=[[16, 2]])), "EXPERT_RANGE"),
    "T19 expert twice": (frame(fields(groups=[[0, 1], [0, 1]])), "EXPERT_RANGE"),
    "T25 groups count too few": (frame(fields(groups=[[0, 1]])), "GROUPS_COUNT"),
    "T25 no groups": (frame(fields(groups=[])), "GROUPS_SHAPE"),
    "T25 group of three": (frame(fields(groups=[[0, 1, 1]])), "GROUPS_SHAPE"),
    "T25 group of text": (frame(fields(groups=[["0", 2]])), "GROUPS_SHAPE"),
    "T28 replay": (frame() + frame(), "SEQUENCE_WRONG"),
    "T36 header of a map": (frame(msgpack.packb({"number": 1})), "HEADER_NOT_MSGPACK"),
    "T36 header of an extension type": (
        frame(msgpack.packb(fields(step=msgpack.ExtType(1, b"x")))),
        "HEADER_NOT_MSGPACK",
    ),
    "T36 header of a timestamp": (frame(msgpack.packb(fields(step=msgpack.Timestamp(1)))), "HEADER_NOT_MSGPACK"),
    "T36 header of an empty extension": (frame(msgpack.packb(fields(step=msgpack.ExtType(1, b"")))), "FIELD_RANGE"),
    "T36 header of bytes": (frame(msgpack.packb(fields(step=b"1"))), "HEADER_NOT_MSGPACK"),
    "T36 header of a float": (frame(fields(step=1.0)), "FIELD_RANGE"),
    "T36 header of a bool": (frame(fields(step=True)), "FIELD_RANGE"),
    "T36 header of nil": (frame(fields(step=None)), "FIELD_RANGE"),
    "T36 header too short": (frame(fields()[:-1]), "HEADER_SHAPE"),
    "T36 header nested deep": (frame(b"\x91" * 2000 + b"\x00"), "HEADER_NOT_MSGPACK"),
    "T36 header announces 2^32 items": (frame(b"\xdd\xff\xff\xff\xff"), "HEADER_NOT_MSGPACK"),
    "T36 header not UTF-8": (frame(msgpack.packb(fields())[:-1] + b"\xa1\xff"), "HEADER_NOT_MSGPACK"),
    "T36 pickle": (pickle.dumps(print, protocol=2).ljust(64, b"."), "MAGIC_WRONG"),
    "T36 JSON": (b'{"jsonrpc": "2.0", "method": "exec"}'.ljust(64), "MAGIC_WRONG"),
    "T36 HTTP": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n".ljust(64), "MAGIC_WRONG"),
    "T35 more frames than credit": (b"".join(frame(sequence=index) for index in range(64)), "CREDIT_EXCEEDED"),
    "T39 frames swapped": (frame(sequence=1) + frame(sequence=0), "SEQUENCE_WRONG"),
    "T40 compressed": (frame(flags=1), "FLAGS_UNKNOWN"),
    "reason in rows": (frame(fields(reason="X")), "REASON_UNEXPECTED"),
}


@pytest.mark.parametrize(("data", "reason"), FRAMES.values(), ids=FRAMES)
def test_a_bad_frame_closes_its_link_and_nothing_else(site: Site, expect_closed, data: bytes, reason: str) -> None:
    client = RawClient(site.server.addresses[0])
    client.prove()
    client.send(data)
    expect_closed(client, reason)


def test_a_frame_cut_by_the_end_of_the_stream_is_an_error(site: Site, expect_closed) -> None:  # T08
    client = RawClient(site.server.addresses[0])
    client.prove()
    client.send(frame()[:-5])
    client.finish()
    expect_closed(client, "FRAME_TRUNCATED")


@pytest.mark.parametrize("length", [1, 39, 41, 100])
def test_a_frame_that_stops_half_way_times_out(site: Site, expect_closed, length: int) -> None:  # T09
    client = RawClient(site.server.addresses[0])
    client.prove()
    client.send(frame()[:length])
    expect_closed(client, "FRAME_TIMEOUT")


def test_a_frame_that_dribbles_times_out(site: Site, expect_closed) -> None:  # T34
    client = RawClient(site.server.addresses[0])
    client.prove()
    for index in range(16):
        client.send(frame()[index : index + 1])
        time.sleep(0.1)
    expect_closed(client, "FRAME_TIMEOUT")


def test_an_expert_that_is_not_here_is_refused_by_name_and_the_link_stays(tmp_path: Path) -> None:  # T19
    with serve(random_table(1), tmp_path) as servers:  # its own host: the canary may want just this expert
        server = servers["host-0"]
        server.compute.held.remove((2, 15))  # type: ignore[attr-defined]
        client = RawClient(server.addresses[0])
        client.prove(hello("asks-for-too-much"))
        client.send(frame(fields(layer=2, groups=[[0, 1], [15, 1]])))
        kind, header = client.read_frame()
        assert (kind, header[7], header[8]) == (NACK, [[15, 1]], "WRONG_OWNER")
        client.send(frame(fields(number=2), sequence=1))
        assert client.read_frame()[0] == REPLY
        client.close()


def test_poison_in_rows_stays_with_its_sender(site: Site) -> None:  # T26
    client = RawClient(site.server.addresses[0])
    client.prove(hello("poisoner"))
    for sequence in range(50):
        client.send(frame(payload=struct.pack("<f", float("nan")) * 2 * WIDTH, sequence=sequence))
        assert client.read_frame()[0] == REPLY
    client.close()
    site.canary.check()


def test_a_link_may_be_silent_after_its_handshake(site: Site) -> None:  # T30: idle is no offence; it holds no slot
    client = RawClient(site.server.addresses[0])
    client.prove(hello("silent"))
    assert not client.closed_within(1.5)
    client.send(frame())
    assert client.read_frame()[0] == REPLY
    client.close()


BEFORE = {
    "pickle": pickle.dumps(print, protocol=2).ljust(64, b"."),
    "HTTP": b"GET / HTTP/1.1\r\nHost: evil.example\r\nAccept: */*\r\n\r\n",
    "msgpack": msgpack.packb(fields()).ljust(64, b"\0"),
    "a frame": frame(),
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("data", BEFORE.values(), ids=BEFORE)
def test_garbage_before_the_handshake_is_closed(site: Site, expect_closed, data: bytes) -> None:  # T29, T36
    client = RawClient(site.server.addresses[0])
    client.send(data)
    expect_closed(client, "GREETING_WRONG")


@pytest.mark.parametrize("data", [b"", b"L4DH", b"L4DH\x04\0\0\0" + bytes(32)], ids=["silence", "part", "no proof"])
def test_an_unfinished_handshake_times_out(site: Site, expect_closed, data: bytes) -> None:  # T29
    client = RawClient(site.server.addresses[0])
    client.send(data)
    expect_closed(client, "HANDSHAKE_TIMEOUT")


def test_a_dribbled_handshake_times_out(site: Site, expect_closed) -> None:  # T34
    client = RawClient(site.server.addresses[0])
    for byte in b"L4DH\x04\0\0\0" + bytes(8):
        client.send(bytes([byte]))
        time.sleep(0.1)
    expect_closed(client, "HANDSHAKE_TIMEOUT")


def test_another_protocol_version_is_closed(site: Site, expect_closed) -> None:  # T02
    client = RawClient(site.server.addresses[0])
    client.send(b"L4DH\x03\0\0\0" + bytes(32))
    expect_closed(client, "PROTOCOL_VERSION")


def test_a_wrong_secret_learns_nothing(site: Site, expect_closed) -> None:  # T29
    client = RawClient(site.server.addresses[0])
    with pytest.raises(ConnectionError):
        client.prove(secret=b"x" * 32)
    expect_closed(client, "SECRET_WRONG")


@pytest.mark.parametrize("length", [2049, 0xFFFFFFFF])
def test_a_hello_over_its_bound_is_closed_before_it_is_read(site: Site, expect_closed, length: int) -> None:
    client = RawClient(site.server.addresses[0])
    client.send(b"L4DH\x04\0\0\0" + bytes(32) + bytes(32) + struct.pack("<I", length))
    expect_closed(client, "HELLO_LENGTH")


def test_a_replayed_handshake_is_worth_nothing(site: Site, expect_closed) -> None:  # T28
    honest = RawClient(site.server.addresses[0])
    sent: list[bytes] = []
    sendall = honest.socket.sendall
    honest.socket = _Spy(honest.socket, sent, sendall)  # type: ignore[assignment]
    honest.prove(hello("honest"))
    replay = RawClient(site.server.addresses[0])
    for data in sent:
        replay.send(data)
    expect_closed(replay, "SECRET_WRONG")
    honest.close()


class _Spy:
    def __init__(self, inner, sent: list[bytes], sendall) -> None:
        self._inner, self._sent, self._sendall = inner, sent, sendall

    def sendall(self, data: bytes) -> None:
        self._sent.append(bytes(data))
        self._sendall(data)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


DIFFERENT = {  # T32, T33
    "MODEL_HASH_DIFFERS": {"model_hash": "f" * 64},
    "WIDTH_DIFFERS": {"width": WIDTH * 2},
    "DTYPE_DIFFERS": {"dtype": "bfloat16"},
    "NUM_LAYERS_DIFFERS": {"num_layers": 99},
    "NUM_EXPERTS_DIFFERS": {"num_experts": 99},
    "NUM_SLICES_DIFFERS": {"num_slices": 2},
    "ARITHMETIC_DIFFERS": {"arithmetic": "torch-cpu"},
    "ROLE_WRONG": {"role": "expert"},
    "HELLO_RANGE": {"incarnation": -1},
    "HELLO_SHAPE": {"incarnation": "1"},
}


@pytest.mark.parametrize(("reason", "changes"), DIFFERENT.items(), ids=DIFFERENT)
def test_a_peer_of_another_model_is_told_why(site: Site, expect_closed, reason: str, changes: dict) -> None:
    client = RawClient(site.server.addresses[0])
    with pytest.raises(HandshakeError) as caught:
        client.prove(replace(hello("other"), **changes))
    assert caught.value.reason == reason
    expect_closed(client, reason)


def test_a_worker_with_another_cut_is_told_what_to_change(site: Site, expect_closed) -> None:
    client = RawClient(site.server.addresses[0])
    with pytest.raises(HandshakeError, match="same `expert_slices`"):
        client.prove(replace(hello("other"), num_slices=2))
    expect_closed(client, "NUM_SLICES_DIFFERS")


def test_a_second_peer_of_one_name_is_refused_and_the_first_stays(site: Site, expect_closed) -> None:  # T31
    first = RawClient(site.server.addresses[0])
    first.prove(hello("twin"))
    second = RawClient(site.server.addresses[0])
    with pytest.raises(HandshakeError) as caught:
        second.prove(hello("twin"))
    assert caught.value.reason == "DUPLICATE_PEER"
    expect_closed(second, "DUPLICATE_PEER")
    first.send(frame())
    assert first.read_frame()[0] == REPLY
    first.close()


def test_half_open_connections_are_bounded(site: Site) -> None:  # T29
    closed = site.server.server.stats().closed_links
    before = closed.copy()
    clients = [RawClient(site.server.addresses[0]) for _ in range(LIMITS.max_half_open + 12)]
    site.canary.check()
    assert all(client.closed_within(3.0) for client in clients)
    assert offences(closed) - offences(before) == {"TOO_MANY_HALF_OPEN": 12, "HANDSHAKE_TIMEOUT": LIMITS.max_half_open}
    for client in clients:
        client.close()
    site.canary.check()


def test_a_thousand_bad_peers_leave_no_memory_and_no_descriptor_behind(site: Site) -> None:
    process = psutil.Process()

    def attack(rounds: int) -> None:
        for index in range(rounds):
            client = RawClient(site.server.addresses[0])
            if index % 3:
                client.prove(hello(f"bad-{index}"))
                client.send(frame(checksum=index))
            else:
                client.send(bytes(100))
            assert client.closed_within(3.0)
            client.close()

    attack(200)
    memory, descriptors = process.memory_info().rss, process.num_fds()
    attack(800)
    site.canary.check()
    assert process.num_fds() <= descriptors
    assert process.memory_info().rss - memory < 8 * 1024 * 1024


def test_a_unix_socket_is_its_owners_alone(site: Site) -> None:
    path = Path(site.server.addresses[0].removeprefix("unix:"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
