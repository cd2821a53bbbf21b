"""Frames as bytes: fixed prefix, bounded msgpack header, raw row bytes. Everything is checked before it is believed.

    prefix   magic 4 | version u16 | flags u16 | checksum u64 | sequence u64 | payload u64 | header u32 | kind u32
    header   msgpack array, no extension types, no maps; zero-padded so that the rows start on a 64-byte boundary
    payload  rows, C order, native byte order; none where flags are 1: rows lie in shared memory, and the header ends
             in where they start there and how many of the receiver's own rows there the sender has read

All integers are little-endian. The checksum is xxh3-64 over everything after itself: it finds damage, not forgery;
who may speak at all is the handshake's. Sequence counts a link's frames from 0, so a frame cannot be replayed or lost.
"""

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import torch
import xxhash
from torch import Tensor

from llama4_dist.dispatch.links.link import BYTES_CODE, DTYPES, FrameHeader, FrameKind
from llama4_dist.errors import FrameError
from llama4_dist.native.extension import extension

MAGIC = b"L4DF"
VERSION = 1
_FRONT = struct.Struct("<4sHHQ")
_BACK = struct.Struct("<QQII")
PREFIX_BYTES = _FRONT.size + _BACK.size
ALIGNMENT = 64
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES.values(), start=1)} | {torch.uint8: BYTES_CODE}
_KINDS = {int(kind): kind for kind in FrameKind}
_HEADER_FIELDS = 9
_SHARED = 1  # the flag
_MAX_INT = 1 << 63
_REASON_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRules:
    """What the handshake agreed on; a frame that breaks it is refused before its rows are read."""

    width: int  # D
    dtype: torch.dtype
    num_layers: int
    num_experts: int
    max_rows: int
    max_header_bytes: int
    num_shared_bytes: int = 0  # of the memory where a peer may put rows; 0 = it may not

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def max_payload_bytes(self) -> int:
        return self.max_rows * self.row_bytes

    @property
    def max_frame_bytes(self) -> int:
        return padded(self.max_header_bytes) + self.max_payload_bytes


class Place(NamedTuple):
    """Where rows lie in shared memory, in bytes, and how many of the other side's replies there were read."""

    offset: int
    num_read: int


class Prefix(NamedTuple):
    """The fixed part of a received frame, checked."""

    kind: FrameKind
    is_shared: bool
    sequence: int
    checksum: int
    header_len: int
    payload_start: int
    frame_len: int


def padded(header_len: int) -> int:
    """Return where the rows start, in bytes from the start of the frame."""
    return (PREFIX_BYTES + header_len + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def encode(
    header: FrameHeader, payload: memoryview, sequence: int, rules: FrameRules, place: Place | None = None
) -> bytes:
    """Return prefix and header of a frame, to be sent before `payload`, which is empty where rows have a `place`."""
    fields = (*header[1:6], _DTYPE_CODES[rules.dtype], rules.width, header.groups, header.reason, *(place or ()))
    body: bytes = msgpack.packb(fields)
    if len(body) > rules.max_header_bytes:
        raise ValueError(f"a header of {len(body)} bytes exceeds the agreed {rules.max_header_bytes}")
    back = _BACK.pack(sequence, payload.nbytes, len(body), header.kind) + body
    back = back.ljust(padded(len(body)) - _FRONT.size, b"\0")
    checksum = xxhash.xxh3_64(back)
    checksum.update(payload)
    return _FRONT.pack(MAGIC, VERSION, _SHARED if place else 0, checksum.intdigest()) + back


def decode_prefix(view: memoryview, rules: FrameRules) -> Prefix:
    """Check the first PREFIX_BYTES of a frame; FrameError names the defect."""
    magic, version, flags, checksum = _FRONT.unpack_from(view)
    if magic != MAGIC:
        raise _defect("MAGIC_WRONG", f"frame starts with {magic!r}")
    if version != VERSION:
        raise _defect("VERSION_UNKNOWN", f"frame version {version}; this build speaks {VERSION}")
    if flags & ~(_SHARED if rules.num_shared_bytes else 0):
        raise _defect("FLAGS_UNKNOWN", f"frame flags {flags:#x}")
    sequence, payload_len, header_len, kind_code = _BACK.unpack_from(view, _FRONT.size)
    kind = _KINDS.get(kind_code)
    if kind is None:
        raise _defect("KIND_UNKNOWN", f"frame kind {kind_code}")
    if not 0 < header_len <= rules.max_header_bytes:
        raise _defect("HEADER_LENGTH", f"header of {header_len} bytes; at most {rules.max_header_bytes}")
    if payload_len > rules.max_payload_bytes:
        raise _defect("PAYLOAD_LENGTH", f"payload of {payload_len} bytes; at most {rules.max_payload_bytes}")
    start = padded(header_len)
    return Prefix(kind, bool(flags), sequence, checksum, header_len, start, start + payload_len)


def decode(view: memoryview, prefix: Prefix, sequence: int, rules: FrameRules) -> tuple[FrameHeader, Place | None]:
    """Check a complete frame; return its header, and where its rows are, if they do not follow.

    `view` is exactly the frame, `sequence` the one expected.
    """
    if xxhash.xxh3_64_intdigest(view[_FRONT.size :]) != prefix.checksum:
        raise _defect("CHECKSUM_WRONG", f"frame {prefix.sequence} is damaged")
    if prefix.sequence != sequence:
        raise _defect("SEQUENCE_WRONG", f"frame {prefix.sequence} came where {sequence} was due")
    header_end = PREFIX_BYTES + prefix.header_len
    if view[header_end : prefix.payload_start].tobytes().strip(b"\0"):
        raise _defect("PADDING_NOT_ZERO", "bytes between header and rows")
    return _parse(view[PREFIX_BYTES:header_end], prefix, rules)


def native_codec(rules: FrameRules) -> Any:
    """Return `native.dispatch.Codec`, which sends and receives frames in one call each; None where there is none.

    It writes the same bytes as `encode`. It takes no frame that `decode` refuses; what it does not take is looked at
    by `decode`, which names the defect.
    """
    native = extension()
    if native is None:
        return None
    kinds = tuple(_KINDS.get(number) for number in range(max(_KINDS) + 1))
    counts = (rules.num_layers, rules.num_experts, rules.max_rows, rules.max_header_bytes, rules.num_shared_bytes)
    return native.Codec(FrameHeader, kinds, rules.width, rules.row_bytes, _DTYPE_CODES[rules.dtype], *counts)


def payload_of(rows_ND: Tensor) -> memoryview:
    """Return the rows' bytes without a copy. NumPy has no bfloat16: its bits are taken as int16."""
    rows = (rows_ND.view(torch.int16) if rows_ND.dtype == torch.bfloat16 else rows_ND).numpy()
    return memoryview(rows).cast("B")  # type: ignore[arg-type]  # NumPy's stubs say so from Python 3.12 on


def _parse(body: memoryview, prefix: Prefix, rules: FrameRules) -> tuple[FrameHeader, Place | None]:
    fields = _unpack(body, rules.num_experts, _HEADER_FIELDS + 2 * prefix.is_shared)
    number, step, microbatch, layer, num_rows, dtype_code, width, groups, reason = fields[:_HEADER_FIELDS]
    kind = prefix.kind
    for value in fields[:7]:
        if type(value) is not int or not 0 <= value < _MAX_INT:
            raise _defect("FIELD_RANGE", f"header field {value!r} is no count")
    if dtype_code != _DTYPE_CODES[rules.dtype]:
        raise _defect("DTYPE_UNEXPECTED", f"rows of dtype code {dtype_code}; {rules.dtype} was agreed")
    if width != rules.width:
        raise _defect("WIDTH_UNEXPECTED", f"rows of width {width}; {rules.width} was agreed")
    if layer >= rules.num_layers:
        raise _defect("LAYER_RANGE", f"layer {layer}; the model has {rules.num_layers}")
    if not 1 <= num_rows <= rules.max_rows:
        raise _defect("ROWS_RANGE", f"{num_rows} rows; 1 to {rules.max_rows} are allowed")
    payload_len = prefix.frame_len - prefix.payload_start
    if payload_len != (0 if kind is FrameKind.NACK or prefix.is_shared else num_rows * rules.row_bytes):
        raise _defect("PAYLOAD_MISMATCH", f"{num_rows} rows do not take {payload_len} bytes")
    if type(reason) is not str or bool(reason) != (kind is FrameKind.NACK):
        raise _defect("REASON_UNEXPECTED", "a reason belongs to a NACK, and only there")
    if kind is not FrameKind.REPLY or groups != ():
        _check_groups(groups, num_rows, kind, rules.num_experts)
    header = FrameHeader(kind, number, step, microbatch, layer, num_rows, groups, reason)
    return header, _check_place(fields[_HEADER_FIELDS:], header, rules) if prefix.is_shared else None


def _check_place(fields: tuple[Any, ...], header: FrameHeader, rules: FrameRules) -> Place:
    """Rows must lie inside of the memory, on an aligned address."""
    offset, num_read = fields
    if type(offset) is not int or type(num_read) is not int or not 0 <= num_read < _MAX_INT:
        raise _defect("PLACE_RANGE", f"rows at {offset!r}, of which {num_read!r} were read")
    if header.kind is FrameKind.NACK:
        raise _defect("PLACE_UNEXPECTED", "a refusal has no rows")
    if offset < 0 or offset % ALIGNMENT or offset + header.num_rows * rules.row_bytes > rules.num_shared_bytes:
        raise _defect(
            "PLACE_RANGE", f"{header.num_rows} rows at {offset} are not within {rules.num_shared_bytes} bytes"
        )
    return Place(offset, num_read)


def _unpack(body: memoryview, num_experts: int, num_fields: int) -> tuple[Any, ...]:
    try:
        fields = msgpack.unpackb(
            body,
            use_list=False,
            max_str_len=_REASON_BYTES,
            max_bin_len=0,
            max_array_len=max(num_fields, num_experts),
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException):
        raise _defect("HEADER_NOT_MSGPACK", "header is no msgpack array within its bounds") from None
    if type(fields) is not tuple or len(fields) != num_fields:
        raise _defect("HEADER_SHAPE", f"header is no array of {num_fields}")
    return fields


def _check_groups(groups: object, num_rows: int, kind: FrameKind, num_experts: int) -> None:
    """Groups must be ((expert, count >= 1), ...) with experts ascending; in ROWS and ADOPT they cover the rows."""
    if type(groups) is not tuple or (kind is FrameKind.REPLY) != (not groups):
        raise _defect("GROUPS_SHAPE", f"groups do not fit a {kind.name} frame")
    last_expert, total = -1, 0
    for group in groups:
        if type(group) is not tuple or len(group) != 2 or type(group[0]) is not int or type(group[1]) is not int:
            raise _defect("GROUPS_SHAPE", "a group is no pair of integers")
        expert, count = group
        if not last_expert < expert < num_experts:
            raise _defect("EXPERT_RANGE", f"expert {expert} after {last_expert}; the model has {num_experts}")
        if count < 1:
            raise _defect("GROUPS_COUNT", f"expert {expert} with {count} rows")
        last_expert = expert
        total += count
    if kind in (FrameKind.ROWS, FrameKind.ADOPT) and total != num_rows:
        raise _defect("GROUPS_COUNT", f"groups count {total} rows, the frame has {num_rows}")


def _defect(reason: str, message: str) -> FrameError:
    return FrameError(message, reason=reason)
