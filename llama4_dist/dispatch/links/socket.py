"""A link over a Unix or TCP socket: rows go out of and come into preallocated memory, without a copy in between.

Never blocks except in `poll`, and there at most as long as asked. A frame waits in a queue where the peer's receive
slots (its credit) or the kernel's buffer are full, so a peer that has stopped holds up nobody else.
"""

import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama4_dist.dispatch.frame import PREFIX_BYTES, Prefix, decode, decode_prefix, encode, payload_of
from llama4_dist.dispatch.handshake import Agreement, Hello, WorkerHandshake, check_secret
from llama4_dist.dispatch.links.address import parse_address
from llama4_dist.dispatch.links.link import Frame, FrameHeader, FrameKind, LinkLimits, LinkStats
from llama4_dist.errors import FrameError, HandshakeError, LinkDownError

MAX_QUEUED_FRAMES = 1024
_FIRST_READ_BYTES = 256 * 1024  # before a frame's length is known; what belongs to the next frame is copied over
_MAX_VIEWS = 64
_BUFFER_BYTES = 4 * 1024 * 1024  # asked of the kernel, which may give less


_NOTHING = memoryview(b"")


class _Slot:
    """Memory for one received frame, untouched until used. Rows start on a 64-byte boundary of it."""

    def __init__(self, num_bytes: int, dtype: torch.dtype) -> None:
        memory = torch.empty(-(-num_bytes // 64) * 64, dtype=torch.uint8)
        self.view = payload_of(memory)
        self._values = memory.view(dtype)
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


class _Outgoing(NamedTuple):
    """Bytes of one frame still to be sent."""

    head: memoryview
    payload: memoryview


class SocketLink:
    """One end of a connection whose handshake is done; `initiator` is the side that sends ROWS, bound by credit."""

    def __init__(self, connection: socket.socket, agreement: Agreement, *, initiator: bool) -> None:
        connection.setblocking(False)
        self.peer = agreement.peer.id
        self.peer_incarnation = agreement.peer.incarnation
        self.limits = agreement.limits
        self._rules = agreement.rules
        self._connection = connection
        self._descriptor = connection.fileno()
        self._initiator = initiator
        self._poller = select.poll()
        self._poller.register(self._descriptor, select.POLLIN)
        self._down: LinkDownError | None = None
        self._stats = LinkStats()
        self._outgoing: deque[_Outgoing] = deque()
        self._held_back: deque[_Outgoing] = deque()  # beyond the peer's credit
        self._unanswered = 0
        self._next_out = 0
        self._next_in = 0
        self._slots = [_Slot(self._rules.max_frame_bytes, self._rules.dtype) for _ in range(self.limits.credit)]
        self._free = deque(range(1, self.limits.credit))
        self._current: int | None = 0  # the slot being filled
        self._filled = 0
        self._prefix: Prefix | None = None
        self._started = 0.0  # when the frame being received began

    @property
    def num_unsent(self) -> int:
        return len(self._outgoing) + len(self._held_back)

    def post(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        if self._down is not None:
            raise self._down
        if self.num_unsent >= MAX_QUEUED_FRAMES:
            raise self._fail(
                LinkDownError(f"{self.peer!r} leaves {MAX_QUEUED_FRAMES} frames queued", reason="QUEUE_FULL")
            )
        payload = _NOTHING if rows_ND is None else payload_of(rows_ND)
        head = encode(header, payload, self._next_out, self._rules)
        num_bytes = len(head) + len(payload)
        self._next_out += 1
        self._stats.frames_out += 1
        self._stats.bytes_out += num_bytes
        if self._initiator:
            if self._unanswered >= self.limits.credit:
                self._held_back.append(_Outgoing(memoryview(head), payload))
                return
            self._unanswered += 1
        if self._outgoing:
            self._outgoing.append(_Outgoing(memoryview(head), payload))
            return
        sent = self._send((head, payload))
        if sent < num_bytes:
            self._outgoing.append(_rest(_Outgoing(memoryview(head), payload), sent))

    def poll(self, timeout_s: float) -> Sequence[Frame]:
        frames: list[Frame] = []
        try:
            self._exchange(frames)
            if not frames and timeout_s > 0:
                self._poller.modify(self._descriptor, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
                self._poller.poll(timeout_s * 1000)
                self._exchange(frames)
        except LinkDownError as error:
            self._fail(error)
        if self._down is not None and not frames:
            raise self._down
        return frames

    def fileno(self) -> int | None:
        return self._descriptor

    def abort(self) -> None:
        self._fail(LinkDownError(f"the link to {self.peer!r} was closed here"))
        self._outgoing.clear()
        self._held_back.clear()
        self._connection.close()

    def stats(self) -> LinkStats:
        return self._stats

    def release_slot(self, slot: int) -> None:
        if self._current is None:
            self._current = slot
        else:
            self._free.append(slot)

    def _exchange(self, frames: list[Frame]) -> None:
        """Send what is queued as far as the kernel takes it, receive what has arrived."""
        if self._down is not None:
            raise self._down
        if self._outgoing:
            self._flush()
        self._receive(frames)
        if self._initiator and frames:
            self._unanswered = max(self._unanswered - len(frames), 0)
            while self._held_back and self._unanswered < self.limits.credit:
                self._outgoing.append(self._held_back.popleft())
                self._unanswered += 1
                self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            first = self._outgoing[0]
            sent = self._send(first)
            if sent < len(first.head) + len(first.payload):
                self._outgoing[0] = _rest(first, sent)
                return
            self._outgoing.popleft()

    def _send(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Return how many bytes the kernel took: 0 when it is full."""
        try:
            return self._connection.sendmsg(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._fail(LinkDownError(f"{self.peer!r} is gone: {error.strerror}")) from None

    def _receive(self, frames: list[Frame]) -> None:
        """Read into the current slot until the kernel has no more, or a frame ended just where the bytes did."""
        while self._current is not None:
            view = self._slots[self._current].view
            end = _FIRST_READ_BYTES if self._prefix is None else self._prefix.frame_len
            window = view[self._filled : end]
            try:
                received = self._connection.recv_into(window)
            except BlockingIOError:
                break
            except OSError as error:
                raise LinkDownError(f"{self.peer!r} is gone: {error.strerror}") from None
            if received == 0:
                raise self._end_of_stream()
            self._filled += received
            self._stats.bytes_in += received
            self._take_frames(frames)
            if not self._filled or received < len(window):
                break
        else:
            self._check_credit()
        if self._filled:
            self._check_progress()
        else:
            self._started = 0.0

    def _take_frames(self, frames: list[Frame]) -> None:
        """Take complete frames off the current slot; bytes of a further frame move on to the next slot."""
        while self._current is not None and self._filled >= PREFIX_BYTES:
            slot = self._slots[self._current]
            if self._prefix is None:
                self._prefix = decode_prefix(slot.view, self._rules)
            prefix = self._prefix
            if self._filled < prefix.frame_len:
                return
            header = decode(slot.view[: prefix.frame_len], prefix, self._next_in, self._rules)
            frames.append(Frame(header, self._rows(slot, header, prefix), self, self._current))
            self._next_in += 1
            self._stats.frames_in += 1
            surplus = slot.view[prefix.frame_len : self._filled]
            self._current, self._filled, self._prefix, self._started = None, 0, None, 0.0
            if self._free:
                self._current = self._free.pop()
                self._filled = len(surplus)
                self._slots[self._current].view[: self._filled] = surplus
            elif len(surplus):
                raise self._credit_exceeded()

    def _rows(self, slot: _Slot, header: FrameHeader, prefix: Prefix) -> Tensor | None:
        if header.kind is FrameKind.NACK:
            return None
        return slot.rows(header.num_rows, self._rules.width, prefix.payload_start // self._rules.dtype.itemsize)

    def _check_credit(self) -> None:
        """All slots are in use: any further byte is beyond the credit."""
        try:
            if self._connection.recv(1, socket.MSG_PEEK):
                raise self._credit_exceeded()
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkDownError(f"{self.peer!r} is gone: {error.strerror}") from None
        raise self._end_of_stream()

    def _check_progress(self) -> None:
        """Refuse a frame that arrives drop by drop: it holds a slot."""
        now = time.monotonic()
        self._started = self._started or now
        if now - self._started > self.limits.frame_timeout_s:
            raise FrameError(
                f"{self.peer!r} did not finish a frame in {self.limits.frame_timeout_s} s", reason="FRAME_TIMEOUT"
            )

    def _end_of_stream(self) -> LinkDownError:
        if self._filled:
            return FrameError(f"{self.peer!r} closed in the middle of a frame", reason="FRAME_TRUNCATED")
        return LinkDownError(f"{self.peer!r} closed the connection")

    def _credit_exceeded(self) -> FrameError:
        return FrameError(
            f"{self.peer!r} sent more than {self.limits.credit} unanswered frames", reason="CREDIT_EXCEEDED"
        )

    def _fail(self, error: LinkDownError) -> LinkDownError:
        """Remember the first reason the link went down."""
        self._down = self._down or error
        return self._down


def connect(address: str, *, hello: Hello, secret: bytes, limits: LinkLimits, timeout_s: float) -> SocketLink:
    """Connect to an expert host and prove who we are, within `timeout_s`.

    Raises HandshakeError when a side does not accept the other, LinkDownError when nobody answers in time.
    """
    check_secret(secret)
    family, target = parse_address(address)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        deadline = time.monotonic() + timeout_s
        connection.settimeout(timeout_s)
        connection.connect(target)
        agreement = _shake_hands(connection, WorkerHandshake(hello, limits, secret), deadline)
        prepare_connection(connection)
        return SocketLink(connection, agreement, initiator=True)
    except OSError as error:
        connection.close()
        raise LinkDownError(f"no link to {address}: {error}") from None
    except BaseException:
        connection.close()
        raise


def prepare_connection(connection: socket.socket) -> None:
    """Send small frames at once, and give large ones room: each refill of the kernel's buffer costs two wake-ups."""
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    else:  # TCP sizes its buffers itself, and better, as long as nobody sets them
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _shake_hands(connection: socket.socket, handshake: WorkerHandshake, deadline: float) -> Agreement:
    connection.sendall(handshake.greeting())
    connection.sendall(handshake.prove(_receive_exactly(connection, WorkerHandshake.GREETING_BYTES, deadline)))
    prefix = _receive_exactly(connection, WorkerHandshake.ANSWER_PREFIX_BYTES, deadline)
    return handshake.finish(prefix, _receive_exactly(connection, handshake.answer_len(prefix), deadline))


def _receive_exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    received = b""
    while len(received) < num_bytes:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise HandshakeError(
                "the host closed during the handshake: check the cluster secret and the protocol version",
                reason="HANDSHAKE_CLOSED",
            )
        received += part
    return received


def _rest(frame: _Outgoing, sent: int) -> _Outgoing:
    """Return what is left of a frame after `sent` bytes of it."""
    return _Outgoing(frame.head[sent:], frame.payload[max(sent - len(frame.head), 0) :])
