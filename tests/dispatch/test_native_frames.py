"""The native codec writes the bytes that `frame` writes and takes no frame that `frame` refuses."""

import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import xxhash

from llama4_dist.dispatch.frame import FrameRules, Place, decode, decode_prefix, encode, native_codec, payload_of
from llama4_dist.dispatch.links.link import FrameHeader, FrameKind
from llama4_dist.errors import FrameError
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler

WIDTH = 8
SLOT = torch.zeros(1 << 16, dtype=torch.uint8)
RULES = FrameRules(
    width=WIDTH,
    dtype=torch.float32,
    num_layers=4,
    num_experts=300,
    max_rows=512,
    max_header_bytes=4096,
    num_shared_bytes=1 << 20,
)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    with left, right:
        yield left, right


def headers(seed: int) -> Iterator[tuple[FrameHeader, Place | None]]:
    """Headers of every kind with rows, with numbers of every length msgpack has."""
    draw = random.Random(seed)
    for _ in range(200):
        kind = draw.choice([FrameKind.ROWS, FrameKind.ADOPT, FrameKind.REPLY])
        experts = sorted(draw.sample(range(300), draw.choice([1, 2, 15, 16, 60])))
        groups = tuple((expert, draw.choice([1, 2, 7])) for expert in experts)
        number, step, microbatch = (draw.getrandbits(draw.choice([3, 7, 8, 15, 16, 31, 32, 40, 62])) for _ in range(3))
        num_rows = sum(count for _, count in groups)
        layer, of_experts = draw.randrange(4), () if kind is FrameKind.REPLY else groups
        header = FrameHeader(kind, number, step, microbatch, layer, num_rows, of_experts)
        place = Place(64 * draw.randrange(1000), draw.getrandbits(20)) if draw.random() < 0.3 else None
        yield header, place


def receive(codec: Any, end: socket.socket, sequence: int, filled: int = 0) -> Any:
    return codec.receive(end.fileno(), SLOT.data_ptr(), SLOT.nbytes, filled, 4096, sequence, 0.0)


def sent_bytes(header: FrameHeader, place: Place | None, sequence: int, rows_RD: torch.Tensor) -> bytes:
    payload = memoryview(b"") if place else payload_of(rows_RD)
    return encode(header, payload, sequence, RULES, place) + bytes(payload)


def test_it_writes_the_same_bytes_and_reads_them_back(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    codec = native_codec(RULES)
    for sequence, (header, place) in enumerate(headers(1)):
        rows_RD = torch.randn(header.num_rows, WIDTH)
        where = place or (-1, 0)
        done = codec.post(left.fileno(), header, sequence, rows_RD.data_ptr(), rows_RD.nbytes, *where)
        expected = sent_bytes(header, place, sequence, rows_RD)
        assert done == (len(expected), len(expected))
        assert right.recv(1 << 16) == expected
        left.send(expected)
        found, start, length, *found_place = receive(codec, right, sequence)
        assert type(found) is FrameHeader
        assert (found, length, found_place) == (header, len(expected), list(where))
        assert type(found.kind) is FrameKind
        if place is None:
            assert bytes(SLOT[start:length].numpy()) == bytes(payload_of(rows_RD))


def test_what_it_takes_python_takes_too_whatever_byte_is_damaged(ends: tuple[socket.socket, socket.socket]) -> None:
    """The checksum is made to fit again, so that it is not what finds the damage."""
    left, right = ends
    codec, draw = native_codec(RULES), random.Random(2)
    num_taken = num_refused = 0
    for sequence, (header, place) in enumerate(headers(3)):
        whole = bytearray(sent_bytes(header, place, sequence, torch.zeros(header.num_rows, WIDTH)))
        whole[draw.randrange(min(len(whole), 160))] ^= 1 << draw.randrange(8)
        whole[8:16] = xxhash.xxh3_64_intdigest(bytes(whole[16:])).to_bytes(8, "little")
        left.send(whole)
        found = receive(codec, right, sequence)
        try:
            prefix = decode_prefix(memoryview(whole), RULES)
            if prefix.frame_len != len(whole):
                raise FrameError("another length", reason="LENGTH")
            expected = decode(memoryview(whole), prefix, sequence, RULES)
        except FrameError:
            assert type(found) is int, f"frame {sequence} was taken natively"
            num_refused += 1
        else:
            if type(found) is tuple:  # rare forms of msgpack are left to Python
                assert (found[0], Place(*found[3:]) if found[3] >= 0 else None) == expected
                num_taken += 1
        right.setblocking(False)
        while True:  # what a frame of another length left
            try:
                right.recv(1 << 16)
            except BlockingIOError:
                break
    assert num_taken > 10
    assert num_refused > 50


@pytest.mark.parametrize("offset", [(1 << 20) - 64, 1 << 20, 1 << 40, 63])
def test_a_place_outside_of_the_memory_is_not_taken(ends: tuple[socket.socket, socket.socket], offset: int) -> None:
    left, right = ends
    codec = native_codec(RULES)
    whole = sent_bytes(FrameHeader(FrameKind.REPLY, 1, 0, 0, 0, 3), Place(offset, 0), 0, torch.ones(3, WIDTH))
    left.send(whole)
    assert receive(codec, right, 0) == len(whole)


def test_a_damaged_checksum_or_a_repeated_frame_is_not_taken(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    codec = native_codec(RULES)
    header = FrameHeader(FrameKind.REPLY, 1, 0, 0, 0, 2)
    whole = bytearray(sent_bytes(header, None, 5, torch.ones(2, WIDTH)))
    left.send(whole)
    assert receive(codec, right, 6) == len(whole)
    whole[-1] ^= 1
    left.send(whole)
    assert receive(codec, right, 5) == len(whole)


def test_a_frame_may_come_byte_by_byte_and_nothing_is_written_beyond_a_slot(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    left, right = ends
    codec = native_codec(RULES)
    header = FrameHeader(FrameKind.REPLY, 1, 0, 0, 0, 2)
    whole = sent_bytes(header, None, 0, torch.ones(2, WIDTH))
    for index, byte in enumerate(whole[:-1]):
        left.send(bytes([byte]))
        assert receive(codec, right, 0, index) == index + 1
    left.send(whole[-1:])
    assert receive(codec, right, 0, len(whole) - 1)[0] == header
    small = torch.zeros(256, dtype=torch.uint8)
    left.send(whole)
    assert codec.receive(right.fileno(), small.data_ptr(), 64, 0, 4096, 0, 0.0) == 64
    assert not small[64:].any()


def test_the_end_of_a_stream_is_told_from_no_news(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    codec = native_codec(RULES)
    assert receive(codec, right, 0) == 0
    left.send(b"L4D")
    left.close()
    assert receive(codec, right, 0) == -1 - 3


def test_rows_that_do_not_fit_their_header_are_not_sent(ends: tuple[socket.socket, socket.socket]) -> None:
    codec = native_codec(RULES)
    rows_RD = torch.zeros(2, WIDTH)
    header = FrameHeader(FrameKind.REPLY, 1, 0, 0, 0, 3)
    assert codec.post(ends[0].fileno(), header, 0, rows_RD.data_ptr(), rows_RD.nbytes, -1, 0) is None


@pytest.mark.parametrize("length", [17, 48, 64, 128, 129, 176, 240, 241, 304, 1024, 1025, 2048, 4097, 70000])
def test_the_checksum_is_xxh3(ends: tuple[socket.socket, socket.socket], length: int) -> None:
    """Frames of many lengths; those of Python carry the checksum of the package xxhash."""
    left, right = ends
    num_rows = max(1, (length - 48) // (WIDTH * 4))
    rules = FrameRules(
        width=WIDTH, dtype=torch.float32, num_layers=1, num_experts=1, max_rows=4096, max_header_bytes=1024
    )
    header, rows_RD = FrameHeader(FrameKind.REPLY, 1, 0, 0, 0, num_rows), torch.randn(num_rows, WIDTH)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    native_codec(rules).post(left.fileno(), header, 0, rows_RD.data_ptr(), rows_RD.nbytes, -1, 0)
    payload = payload_of(rows_RD)
    expected = encode(header, payload, 0, rules) + bytes(payload)
    received = b""
    while len(received) < len(expected):
        received += right.recv(1 << 20)
    assert received == expected
