"""A client that speaks the protocol by hand, so that it can speak it wrong."""

import socket
import struct
import time
from collections.abc import Mapping

import msgpack
import xxhash

from llama4_dist.dispatch.handshake import Hello, WorkerHandshake
from llama4_dist.dispatch.links.address import parse_address
from llama4_dist.dispatch.links.link import LinkLimits
from tests.dispatch.fakes import WIDTH
from tests.dispatch.servers import SECRET, hello

ROWS, REPLY, NACK = 1, 2, 3
FLOAT32, BFLOAT16 = 1, 2


def fields(**changes: object) -> list[object]:
    """The header of two rows for expert 0 of layer 0, with changes."""
    values: dict[str, object] = {
        "number": 1,
        "step": 0,
        "microbatch": 0,
        "layer": 0,
        "num_rows": 2,
        "dtype": FLOAT32,
        "width": WIDTH,
        "groups": [[0, 2]],
        "reason": "",
    }
    assert not changes.keys() - values.keys()
    return list((values | changes).values())


def frame(header: bytes | list[object] | None = None, payload: bytes | None = None, **prefix: object) -> bytes:
    """A frame that is right but for what is given; the checksum fits unless it is given."""
    body = msgpack.packb(fields() if header is None else header) if not isinstance(header, bytes) else header
    payload = bytes(2 * WIDTH * 4) if payload is None else payload
    values: Mapping[str, object] = {
        "magic": b"L4DF",
        "version": 1,
        "flags": 0,
        "sequence": 0,
        "payload_len": len(payload),
        "header_len": len(body),
        "kind": ROWS,
        "padding": b"\0",
    } | prefix
    back = struct.pack("<QQII", *(values[name] for name in ("sequence", "payload_len", "header_len", "kind")))
    back += body
    back = back.ljust((40 + len(body) + 63) // 64 * 64 - 16, values["padding"]) + payload  # type: ignore[arg-type]
    checksum = prefix.get("checksum", xxhash.xxh3_64_intdigest(back))
    return struct.pack("<4sHHQ", values["magic"], values["version"], values["flags"], checksum) + back


class RawClient:
    """A connected socket; `prove` does an honest handshake."""

    def __init__(self, address: str) -> None:
        family, target = parse_address(address)
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(5.0)
        self.socket.connect(target)

    def prove(self, own: Hello | None = None, *, secret: bytes = SECRET, limits: LinkLimits | None = None) -> None:
        handshake = WorkerHandshake(own or hello("mallory"), limits or LinkLimits(), secret)
        self.socket.sendall(handshake.greeting())
        self.socket.sendall(handshake.prove(self._read(handshake.GREETING_BYTES)))
        prefix = self._read(handshake.ANSWER_PREFIX_BYTES)
        handshake.finish(prefix, self._read(handshake.answer_len(prefix)))

    def send(self, data: bytes) -> None:
        """Send, and do not mind being closed meanwhile."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def finish(self) -> None:
        """Say that nothing more will come."""
        self.socket.shutdown(socket.SHUT_WR)

    def closed_within(self, seconds: float) -> bool:
        """Read until the server closes; False when it has not by then."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                if not self.socket.recv(65536):
                    return True
            except TimeoutError:
                return False
            except ConnectionResetError:
                return True
        return False

    def read_frame(self) -> tuple[int, list[object]]:
        """Return kind and header of the next frame; drops its rows."""
        prefix = self._read(40)
        _, payload_len, header_len, kind = struct.unpack("<QQII", prefix[16:])
        body = self._read((40 + header_len + 63) // 64 * 64 - 40)
        self._read(payload_len)
        return kind, msgpack.unpackb(body[:header_len])

    def close(self) -> None:
        self.socket.close()

    def _read(self, num_bytes: int) -> bytes:
        received = b""
        while len(received) < num_bytes:
            part = self.socket.recv(num_bytes - len(received))
            if not part:
                raise ConnectionError("the server closed")
            received += part
        return received
