"""A link over a Unix or TCP socket: rows go out of and come into preallocated memory, without a copy in between.

Never blocks except in `poll`, and there at most as long as asked. A frame waits in a queue where the peer's receive
slots (its credit) or the kernel's buffer are full, so a peer that has stopped holds up nobody else.
"""

import select
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from llama4_dist.dispatch.frame import Place, encode, native_codec, payload_of
from llama4_dist.dispatch.handshake import Agreement
from llama4_dist.dispatch.links.link import Frame, FrameHeader, LinkStats
from llama4_dist.dispatch.links.patience import LOOK_S
from llama4_dist.dispatch.links.receiver import Receiver
from llama4_dist.dispatch.links.shared_rows import SharedRows
from llama4_dist.errors import LinkDownError

MAX_QUEUED_FRAMES = 1024
_NOTHING = memoryview(b"")
_new_tuple = tuple.__new__  # a quarter of what a named tuple's own constructor takes


class _Outgoing(NamedTuple):
    """Bytes of one frame still to be sent."""

    head: memoryview
    payload: memoryview


class SocketLink:
    """One end of a connection whose handshake is done; `initiator` is the side that sends ROWS, bound by credit."""

    def __init__(
        self,
        connection: socket.socket,
        agreement: Agreement,
        *,
        initiator: bool,
        memories: list[int] | None = None,  # what `shared_rows` makes; the caller closes the descriptors
    ) -> None:
        connection.setblocking(False)
        self.peer = agreement.peer.id
        self.peer_incarnation = agreement.peer.incarnation
        self.limits = agreement.limits
        self._rules = agreement.rules
        self.shared: SharedRows | None = None
        if memories is not None:
            self.shared = SharedRows(memories, self._rules, self.limits.credit, initiator=initiator)
            self._rules = replace(self._rules, num_shared_bytes=self.shared.num_incoming_bytes)
        self._connection = connection
        self.transport = "unix" if connection.family == socket.AF_UNIX else "tcp"
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
        self._codec = native_codec(self._rules)
        self._receiver = Receiver(connection, self.peer, self._rules, self.limits, self._stats, self.shared)

    @property
    def num_unsent(self) -> int:
        return len(self._outgoing) + len(self._held_back)

    def post(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        if self._down is not None:
            raise self._down
        if len(self._outgoing) + len(self._held_back) >= MAX_QUEUED_FRAMES:
            raise self._fail(
                LinkDownError(f"{self.peer!r} leaves {MAX_QUEUED_FRAMES} frames queued", reason="QUEUE_FULL")
            )
        number, self._next_out = self._next_out, self._next_out + 1
        self._stats.frames_out += 1
        if self._initiator:
            if self._unanswered >= self.limits.credit:
                self._held_back.append(self._encode(header, rows_ND, number))
                return
            self._unanswered += 1
        place = None if self.shared is None or rows_ND is None else self._share(header, rows_ND, self.shared)
        if self._outgoing:
            self._outgoing.append(self._encode(header, rows_ND, number, place))
        elif self._codec is None or rows_ND is None or not self._post_native(header, rows_ND, number, place):
            frame = self._encode(header, rows_ND, number, place)
            self._queue_rest(frame, self._send(frame))

    def _share(self, header: FrameHeader, rows_ND: Tensor, shared: SharedRows) -> Place | None:
        """Put large rows where the peer can read them; None where they have to follow their frame."""
        num_bytes = rows_ND.nbytes
        if num_bytes < self.limits.shared_from_bytes:
            return None
        offset = shared.copy_in(header.number, rows_ND) if self._initiator else shared.post(rows_ND)
        if offset < 0:
            return None
        self._stats.shared_bytes_out += num_bytes
        return _new_tuple(Place, (offset, shared.num_read if self._initiator else 0))

    def _post_native(self, header: FrameHeader, rows_ND: Tensor, number: int, place: Place | None) -> bool:
        """Encode and send in one call; return whether that was possible."""
        assert rows_ND.is_contiguous(), "rows of a frame lie in one piece"
        where = (-1, 0) if place is None else place
        try:
            done = self._codec.post(self._descriptor, header, number, rows_ND.data_ptr(), rows_ND.nbytes, *where)
        except OSError as error:
            raise self._fail(LinkDownError(f"{self.peer!r} is gone: {error.strerror}")) from None
        if done is None:
            return False
        num_bytes, sent = done
        if sent == num_bytes:
            self._stats.bytes_out += num_bytes
        else:  # the same bytes again
            self._queue_rest(self._encode(header, rows_ND, number, place), sent)
        return True

    def _encode(
        self, header: FrameHeader, rows_ND: Tensor | None, number: int, place: Place | None = None
    ) -> _Outgoing:
        payload = _NOTHING if rows_ND is None or place is not None else payload_of(rows_ND)
        head = memoryview(encode(header, payload, number, self._rules, place))
        self._stats.bytes_out += len(head) + len(payload)
        return _Outgoing(head, payload)

    def _queue_rest(self, frame: _Outgoing, sent: int) -> None:
        if sent < len(frame.head) + len(frame.payload):
            self._outgoing.append(_rest(frame, sent))

    def post_half(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        """Send the first half of a frame, which leaves the link as a process does that dies while it sends."""
        payload = _NOTHING if rows_ND is None else payload_of(rows_ND)
        head = encode(header, payload, self._next_out, self._rules)
        whole = head + bytes(payload)
        self._send((whole[: len(whole) // 2],))

    def poll(self, timeout_s: float) -> Sequence[Frame]:
        frames: list[Frame] = []
        if self._down is not None:
            raise self._down
        try:
            self._exchange(frames, min(timeout_s, LOOK_S))
            if not frames and timeout_s > LOOK_S:
                self._poller.modify(self._descriptor, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
                self._poller.poll((timeout_s - LOOK_S) * 1000)
                self._exchange(frames)
        except LinkDownError as error:
            self._fail(error)
            if not frames:
                raise
        return frames

    def fileno(self) -> int | None:
        return self._descriptor

    def abort(self) -> None:
        self._fail(LinkDownError(f"the link to {self.peer!r} was closed here"))
        self._outgoing.clear()
        self._held_back.clear()
        if self.shared is not None:
            self.shared.close()
        self._connection.close()

    def stats(self) -> LinkStats:
        return self._stats

    def _exchange(self, frames: list[Frame], look_s: float = 0.0) -> None:
        """Send what is queued as far as the kernel takes it, receive what has arrived."""
        if self._outgoing:
            self._flush()
            look_s = 0.0 if self._outgoing else look_s  # the peer may wait for the rest
        self._receiver.receive(frames, look_s)
        if self._initiator and frames:
            self._unanswered = max(self._unanswered - len(frames), 0)
            if self.shared is not None:
                for frame in frames:
                    self.shared.answered(frame.header.number)
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

    def _fail(self, error: LinkDownError) -> LinkDownError:
        """Remember the first reason the link went down."""
        self._down = self._down or error
        return self._down


def _rest(frame: _Outgoing, sent: int) -> _Outgoing:
    """Return what is left of a frame after `sent` bytes of it."""
    return _Outgoing(frame.head[sent:], frame.payload[max(sent - len(frame.head), 0) :])
