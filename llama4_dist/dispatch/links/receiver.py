"""The receiving half of a socket link: bytes into preallocated slots, complete frames out of them. Sends nothing.

A slot is memory for one frame; there are as many as the peer may have frames unanswered (its credit).
"""

import socket
import time
from collections import deque

import torch
from torch import Tensor

from llama4_dist.dispatch.frame import PREFIX_BYTES, FrameRules, Prefix, decode, decode_prefix, native_codec, payload_of
from llama4_dist.dispatch.links.link import Frame, FrameHeader, FrameKind, LinkLimits, LinkStats
from llama4_dist.dispatch.links.shared_rows import SharedRows
from llama4_dist.errors import FrameError, LinkDownError

_FIRST_READ_BYTES = 256 * 1024  # before a frame's length is known; what belongs to the next frame is copied over
_MAX_VIEWS = 64


class _Slot:
    """Memory for one received frame, untouched until used. Rows start on a 64-byte boundary of it."""

    def __init__(self, num_bytes: int, dtype: torch.dtype) -> None:
        memory = torch.empty(-(-num_bytes // 64) * 64, dtype=torch.uint8)
        self.view = payload_of(memory)
        self.address, self.num_bytes = memory.data_ptr(), memory.nbytes
        self.first = self.view[:_FIRST_READ_BYTES]
        self._values = memory.view(dtype)
        self.holds_shared = False  # the frame's rows lie in shared memory
        self._rows: dict[tuple[int, int, int], Tensor] = {}

    def rows(self, num_rows: int, width: int, start: int) -> Tensor:
        """Return [num_rows, width] from element `start` on; the same view again where a shape repeats, as in decode."""
        rows_RD = self._rows.get((num_rows, width, start))
        if rows_RD is None:
            if len(self._rows) >= _MAX_VIEWS:
                self._rows.clear()
            rows_RD = self._values.as_strided((num_rows, width), (width, 1), start)
            self._rows[num_rows, width, start] = rows_RD
        return rows_RD


class Receiver:
    """Takes frames off a non-blocking socket. FrameError when the peer breaks a rule, LinkDownError when it is gone."""

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        rules: FrameRules,
        limits: LinkLimits,
        stats: LinkStats,
        shared: SharedRows | None,
    ) -> None:
        self._connection = connection
        self._descriptor = connection.fileno()
        self._peer = peer
        self._rules = rules
        self._itemsize = rules.dtype.itemsize
        self._codec = native_codec(rules)
        self._limits = limits
        self._stats = stats
        self._next = 0  # sequence number due
        self._shared = shared
        self._slots = [_Slot(rules.max_frame_bytes, rules.dtype) for _ in range(limits.credit)]
        self._free = deque(range(1, limits.credit))
        self._current: int | None = 0  # the slot being filled
        self._filled = 0
        self._prefix: Prefix | None = None
        self._started = 0.0  # when the frame being received began

    def receive(self, frames: list[Frame], look_s: float = 0.0) -> None:
        """Read into the current slot until the kernel has no more, or a frame ended just where the bytes did.

        Where it can, it looks for what is not there yet for `look_s`.
        """
        if self._current is None:
            self._check_credit()
        elif self._codec is not None:
            self._receive_native(frames, self._slots[self._current], self._current, look_s)
        else:
            self._receive(frames)
        if self._filled:
            self._check_progress()

    def _receive(self, frames: list[Frame]) -> None:
        while self._current is not None:
            slot = self._slots[self._current]
            if self._filled == 0:
                window = slot.first
            else:
                end = _FIRST_READ_BYTES if self._prefix is None else self._prefix.frame_len
                window = slot.view[self._filled : end]
            try:
                received = self._connection.recv_into(window)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkDownError(f"{self._peer!r} is gone: {error.strerror}") from None
            if received == 0:
                raise self._end_of_stream()
            self._filled += received
            self._stats.bytes_in += received
            self._take_frames(frames)
            if not self._filled or received < len(window):
                return
        self._check_credit()

    def _receive_native(self, frames: list[Frame], slot: _Slot, index: int, look_s: float) -> None:
        """Do the same in one call, where what arrives is one frame that is as it must be."""
        before = self._filled
        try:
            found = self._codec.receive(
                self._descriptor, slot.address, slot.num_bytes, before, _FIRST_READ_BYTES, self._next, look_s
            )
        except OSError as error:
            raise LinkDownError(f"{self._peer!r} is gone: {error.strerror}") from None
        if type(found) is tuple:
            header, start, frame_len, offset, num_read = found
            if offset < 0:
                rows_RD = slot.rows(header[5], self._rules.width, start // self._itemsize)
            else:
                rows_RD = self._shared_rows(slot, header, offset, num_read)
            self._stats.bytes_in += frame_len - before
            self._add(frames, Frame(header, rows_RD, self, index))
            self._current = self._free.pop() if self._free else None
            return
        self._filled = found if found >= 0 else -1 - found
        self._stats.bytes_in += self._filled - before
        if found < 0:
            raise self._end_of_stream()
        if self._filled:
            self._take_frames(frames)

    def _shared_rows(self, slot: _Slot, header: FrameHeader, offset: int, num_read: int) -> Tensor:
        assert self._shared is not None, "frames are not taken whose rows are nowhere"
        self._shared.acknowledge(num_read)
        slot.holds_shared = True
        self._stats.shared_bytes_in += header.num_rows * self._rules.row_bytes
        return self._shared.rows_at(offset, header.num_rows)

    def release_slot(self, slot: int) -> None:
        if self._slots[slot].holds_shared and self._shared is not None:
            self._slots[slot].holds_shared = False
            self._shared.num_read += 1
        if self._current is None:
            self._current = slot
        else:
            self._free.append(slot)

    def _take_frames(self, frames: list[Frame]) -> None:
        """Take complete frames off the current slot; bytes of a further frame move on to the next slot."""
        rules = self._rules
        while self._current is not None and self._filled >= PREFIX_BYTES:
            slot = self._slots[self._current]
            prefix = self._prefix
            if prefix is None:
                prefix = self._prefix = decode_prefix(slot.view, rules)
            frame_len = prefix.frame_len
            if self._filled < frame_len:
                return
            header, place = decode(slot.view[:frame_len], prefix, self._next, rules)
            rows_RD = None
            if place is not None:
                rows_RD = self._shared_rows(slot, header, *place)
            elif header.kind is not FrameKind.NACK:
                rows_RD = slot.rows(header.num_rows, rules.width, prefix.payload_start // rules.dtype.itemsize)
            surplus = slot.view[frame_len : self._filled]
            self._add(frames, Frame(header, rows_RD, self, self._current))
            self._current = None
            if self._free:
                self._current = self._free.pop()
                if surplus:
                    self._filled = len(surplus)
                    self._slots[self._current].view[: self._filled] = surplus
            elif surplus:
                raise self._credit_exceeded()

    def _add(self, frames: list[Frame], frame: Frame) -> None:
        frames.append(frame)
        self._next += 1
        self._stats.frames_in += 1
        self._filled, self._prefix, self._started = 0, None, 0.0

    def _check_credit(self) -> None:
        """All slots are in use: any further byte is beyond the credit."""
        try:
            if self._connection.recv(1, socket.MSG_PEEK):
                raise self._credit_exceeded()
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkDownError(f"{self._peer!r} is gone: {error.strerror}") from None
        raise self._end_of_stream()

    def _check_progress(self) -> None:
        """Refuse a frame that arrives drop by drop: it holds a slot."""
        now = time.monotonic()
        self._started = self._started or now
        if now - self._started > self._limits.frame_timeout_s:
            raise FrameError(
                f"{self._peer!r} did not finish a frame in {self._limits.frame_timeout_s} s", reason="FRAME_TIMEOUT"
            )

    def _end_of_stream(self) -> LinkDownError:
        if self._filled:
            return FrameError(f"{self._peer!r} closed in the middle of a frame", reason="FRAME_TRUNCATED")
        return LinkDownError(f"{self._peer!r} closed the connection")

    def _credit_exceeded(self) -> FrameError:
        return FrameError(
            f"{self._peer!r} sent more than {self._limits.credit} unanswered frames", reason="CREDIT_EXCEEDED"
        )
