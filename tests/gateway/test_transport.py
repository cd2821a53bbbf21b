"""Bytes that are no gRPC at all: the connection ends, and nobody else notices."""

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator

import pytest

from llama4_dist.client import Client
from llama4_dist.request import Sampling
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, serving

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS_PER_FRAME = 16_000


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(ScriptedEngine(step_s=0.001)) as running:
        yield running


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


SETTINGS = frame(4, 0, 0)
PATH = b"/llama4_dist.v1.InferenceService/StreamGenerate"
# HPACK (RFC 7541): :method POST and :scheme http are indexed, the rest literals that enter no table.
REQUEST = (
    b"\x83\x86"
    + bytes([0x04, len(PATH)])
    + PATH
    + b"\x01\x09localhost"
    + b"\x00\x02te\x08trailers"
    + b"\x00\x0ccontent-type\x10application/grpc"
)


def with_header(key: bytes, value: bytes) -> bytes:
    """A call with one more header."""
    literal = b"\0" + bytes([len(key)]) + key + bytes([len(value)]) + value
    return PREFACE + SETTINGS + frame(1, 4, 1, REQUEST + literal) + frame(0, 1, 1, b"\0\0\0\0\0")


ATTACKS = {
    "a line break in metadata": with_header(b"x-a", b"a\r\nset-cookie: b"),
    "binary metadata that is no base64": with_header(b"x-bin", b"!!!"),
    "a credential that is no text": with_header(b"authorization", b"\xff\xfe\0"),
    "an upper-case header": with_header(b"X-Upper", b"a"),
    "a timeout that is none": with_header(b"grpc-timeout", b"soon"),
    "an encoding that is none": with_header(b"grpc-encoding", b"nonsense"),
    "a bad preface": b"\x16\x03\x01" + b"A" * 400,
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a flood of empty SETTINGS": PREFACE + SETTINGS * 20_000,
    "a flood of pings": PREFACE + SETTINGS + frame(6, 0, 0, b"12345678") * 20_000,
    "a window overflow": PREFACE + SETTINGS + frame(8, 0, 0, struct.pack(">I", 2**31 - 1)) * 2,
    "rapid reset": PREFACE
    + SETTINGS
    + b"".join(frame(1, 4, 2 * i + 1, REQUEST) + frame(3, 0, 2 * i + 1, b"\0\0\0\x08") for i in range(5000)),
    "a continuation flood": PREFACE
    + SETTINGS
    + frame(1, 0, 1, REQUEST)
    + frame(9, 0, 1, b"\x00\x01a\x01b" * (HEADERS_PER_FRAME // 5)) * 10,
    "padding longer than the frame": PREFACE + SETTINGS + frame(1, 4 | 8, 1, b"\xff" + REQUEST),
    "data after the end of a stream": PREFACE
    + SETTINGS
    + frame(1, 4 | 1, 1, REQUEST)
    + frame(0, 0, 1, b"\0\0\0\0\0") * 100,
    "a frame above the maximum": PREFACE + SETTINGS + frame(0, 0, 1, b"x" * 100_000),
    "a frame of an unknown kind": PREFACE + SETTINGS + frame(99, 0, 0, b"x" * 100) * 100,
    "a header block that is no HPACK": PREFACE + SETTINGS + frame(1, 4, 1, b"\xff" * 200),
}


def is_closed(connection: socket.socket, timeout_s: float) -> bool:
    """Read until the peer closes; False if it does not in time."""
    connection.settimeout(0.2)
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            if not connection.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def push(served: Served, data: bytes) -> socket.socket:
    host, port = served.address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    with contextlib.suppress(OSError):  # closed while we were still sending: that is an answer too
        connection.sendall(data)
    return connection


@pytest.mark.parametrize("name", ATTACKS)
def test_no_bytes_disturb_a_running_stream(served: Served, name: str) -> None:
    with Client(served.address) as client:
        stream = client.stream_generate([4], Sampling(max_tokens=150))
        deltas = iter(stream)
        received = list(next(deltas).token_ids)
        connections = [push(served, ATTACKS[name]) for _ in range(3)]
        received += [token for delta in deltas for token in delta.token_ids]
        assert tuple(received) == expected_tokens([4], 150)
        assert client.generate([5], Sampling(max_tokens=3), timeout_s=5).token_ids == expected_tokens([5], 3)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("name", ["a bad preface", "HTTP/1.1", "a flood of pings", "a frame above the maximum"])
def test_a_connection_that_breaks_the_protocol_is_closed(served: Served, name: str) -> None:
    with push(served, ATTACKS[name]) as connection:
        assert is_closed(connection, 3.0)


def test_tls_to_the_plaintext_port_is_closed(served: Served) -> None:
    host, port = served.address.split(":")
    context = ssl.create_default_context()
    with socket.create_connection((host, int(port)), timeout=5) as plain, pytest.raises(OSError):
        context.wrap_socket(plain, server_hostname="localhost")


def test_silent_connections_cost_others_nothing(served: Served) -> None:
    host, port = served.address.split(":")
    silent = [socket.create_connection((host, int(port)), timeout=5) for _ in range(200)]
    with Client(served.address) as client:
        assert client.generate([5], Sampling(max_tokens=3), timeout_s=5).token_ids == expected_tokens([5], 3)
    for connection in silent:
        connection.close()
