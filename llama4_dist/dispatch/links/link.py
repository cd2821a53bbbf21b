"""What every transport offers: post a frame, poll for frames, abort. Knows no routing and no arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SHARED_FROM_BYTES = 384 * 1024  # below, the kernel is as fast


class FrameKind(IntEnum):
    ROWS = 1  # attention worker to expert host: rows to compute
    REPLY = 2  # expert host to attention worker: the computed rows
    NACK = 3  # expert host to attention worker: refused; `reason` says why, `groups` names the experts
    ADOPT = 4  # as ROWS, of experts that no live host holds: map them first


class FrameHeader(NamedTuple):
    """What a frame says about its rows. Worker and incarnation are the link's: its handshake fixed them.

    `number` is the sender's name for the frame; a reply repeats number, step, microbatch, layer and num_rows. `groups`
    are ((expert, num_rows), ...), consecutive in the rows; empty in a REPLY. A named tuple, not a dataclass: one is
    made per frame, and a frozen dataclass costs five times as much.
    """

    kind: FrameKind
    number: int
    step: int
    microbatch: int
    layer: int
    num_rows: int
    groups: tuple[tuple[int, int], ...] = ()
    reason: str = ""


class Frame:
    """A received frame. `rows_RD` lies in the link's receive slot and is valid until `release`."""

    __slots__ = ("_link", "header", "rows_RD", "slot")

    def __init__(self, header: FrameHeader, rows_RD: Tensor | None, link: "SlotOwner", slot: int) -> None:
        self.header = header
        self.rows_RD = rows_RD
        self.slot = slot
        self._link = link

    def release(self) -> None:
        """Give the receive slot back; the rows may be overwritten from now on."""
        self._link.release_slot(self.slot)


class SlotOwner(Protocol):
    def release_slot(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """What a peer may ask of us; each is checked before memory is touched. Peers use the smaller of both sides' values.

    `credit` is the number of frames one side may have unanswered, and so the number of receive slots of a link.
    """

    max_rows: int = 8192
    credit: int = 4
    max_header_bytes: int = 64 * 1024
    frame_timeout_s: float = 10.0  # a frame must be complete this long after its first byte
    handshake_timeout_s: float = 5.0
    max_half_open: int = 64  # connections that have not finished their handshake, per server
    max_links: int = 256  # per server
    shared_from_bytes: int = SHARED_FROM_BYTES  # rows of so many go by memory that processes share; 0 = never

    def __post_init__(self) -> None:
        if not 1 <= self.max_rows <= 1 << 20:
            raise ValueError(f"max_rows {self.max_rows} is outside [1, {1 << 20}]")
        if not 1 <= self.credit <= 64:
            raise ValueError(f"credit {self.credit} is outside [1, 64]")
        if not 1024 <= self.max_header_bytes <= 64 * 1024:
            raise ValueError(f"max_header_bytes {self.max_header_bytes} is outside [1024, 65536]")
        if not min(self.frame_timeout_s, self.handshake_timeout_s) > 0:
            raise ValueError("frame_timeout_s and handshake_timeout_s must be positive")
        if self.shared_from_bytes < 0:
            raise ValueError(f"shared_from_bytes {self.shared_from_bytes} is negative; 0 = never")
        if min(self.max_half_open, self.max_links) < 1:
            raise ValueError("max_half_open and max_links must be at least 1")


@dataclass(slots=True)
class LinkStats:
    """Counters since the link came up; bytes include prefixes and headers (0 for `inproc`, which has none).

    Bytes of rows that lie in shared memory are counted apart.
    """

    frames_out: int = 0
    frames_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    shared_bytes_out: int = 0
    shared_bytes_in: int = 0


class Clock(Protocol):
    """What of the module `time` is used; tests give one that they move themselves."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class Link(Protocol):
    """One end of a connection between an attention worker and an expert host."""

    peer: str  # id of the other side
    peer_incarnation: int
    limits: LinkLimits
    transport: str  # inproc, unix or tcp

    @property
    def num_unsent(self) -> int:
        """Frames posted whose rows are still needed: not yet wholly handed to the transport."""

    def post(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        """Send or queue a frame; returns at once. The rows must stay unchanged until `num_unsent` is 0.

        Raises LinkDownError when the peer is gone or its queue is over the bound.
        """

    def poll(self, timeout_s: float) -> Sequence[Frame]:
        """Flush what is queued and return frames that are complete, waiting at most `timeout_s` for the first.

        Raises LinkDownError when the peer is gone, FrameError when it sent an invalid frame; the link is closed then.
        """

    def fileno(self) -> int | None:
        """Return the descriptor to wait on; None for a link that `poll` itself drives."""

    def abort(self) -> None:
        """Close at once; never blocks, may be called again."""

    def stats(self) -> LinkStats: ...


DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BYTES_CODE = 4  # of rows that are no numbers by themselves, where the place in DTYPES is the others'


def dtype_name(dtype: torch.dtype) -> str:
    """Return the wire's name of a row dtype; ValueError for a dtype rows cannot have."""
    for name, value in DTYPES.items():
        if value == dtype:
            return name
    raise ValueError(f"rows cannot be {dtype}; choose one of {', '.join(DTYPES)}")
