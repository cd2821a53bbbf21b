"""Messages between stages as bytes: a fixed prefix, a bounded header, raw tensor bytes. Knows no sockets.

    prefix   magic 4 | version u16 | kind u16 | sequence u64 | checksum u64 | header u32 | zero u32 | payload u64

All integers are little-endian. The checksum is xxh3-64 over header and payload: it finds damage, not forgery; who may
speak at all is the handshake's. Sequence counts a link's messages from 0, so none is repeated or lost.
The frames of expert links carry rows by unit and answer each other within a credit; a plan has no rows and nothing
answers it. So stages share the handshake and the sockets with those, and not the frames.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import xxhash

from llama4_dist.stages.links.defect import defect

MAGIC = b"L4DP"
VERSION = 2  # of these and of what their headers say; a Hello names it, so that nobody is sent what it cannot read
MAX_HEADER_BYTES = 64 * 1024 * 1024  # of a plan: token ids, and 4 bytes for every page of every sequence
_PREFIX = struct.Struct("<4sHHQQIIQ")
PREFIX_BYTES = _PREFIX.size


class MessageKind(IntEnum):
    PLAN = 1  # leader to member: a part of a step
    OUTPUT = 2  # member to the next stage or the leader: what came of it
    STORE = 3  # rank to rank, while they meet: a key and its value


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBounds:
    """What may come by a link: one kind of message, with at most so many bytes behind its header."""

    kind: MessageKind
    max_payload_bytes: int = 0
    max_header_bytes: int = 64 * 1024


class Prefix(NamedTuple):
    """The fixed part of a message, checked."""

    checksum: int
    header_len: int
    payload_len: int


def prefix_of(kind: MessageKind, sequence: int, header: bytes, payload: memoryview) -> bytes:
    """Return the fixed part of a message."""
    checksum = checksum_of(header, payload)
    return _PREFIX.pack(MAGIC, VERSION, kind, sequence, checksum, len(header), 0, len(payload))


def read_prefix(received: bytes | bytearray, sequence: int, bounds: FrameBounds) -> Prefix:
    """Check a message's fixed part before memory is taken for the rest; FrameError."""
    magic, version, kind, number, checksum, header_len, zero, payload_len = _PREFIX.unpack(received)
    checks: tuple[tuple[bool, str, Callable[[], str]], ...] = (
        (magic == MAGIC and zero == 0, "MAGIC_WRONG", lambda: "what came is no message between stages"),
        (version == VERSION, "VERSION_UNKNOWN", lambda: f"version {version} came, this build speaks {VERSION}"),
        (kind == bounds.kind, "KIND_WRONG", lambda: f"kind {kind} came where {bounds.kind.name} is due"),
        (number == sequence, "SEQUENCE_WRONG", lambda: f"message {number} came where {sequence} is due"),
        (header_len <= bounds.max_header_bytes, "HEADER_LENGTH", lambda: f"a header of {header_len} bytes"),
        (payload_len <= bounds.max_payload_bytes, "PAYLOAD_LENGTH", lambda: f"a payload of {payload_len} bytes"),
    )
    for holds, reason, message in checks:
        if not holds:
            raise defect(reason, message())
    return Prefix(checksum, header_len, payload_len)


def checksum_of(header: bytes | bytearray | memoryview, payload: memoryview) -> int:
    """Return the checksum of what follows the prefix."""
    digest = xxhash.xxh3_64(header)
    digest.update(payload)
    return digest.intdigest()
