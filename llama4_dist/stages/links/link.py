"""One connection between two processes of a group: sends messages, and receives them in a thread of its own.

What comes is taken from the kernel at once, also while this process computes: a stage that sends never waits for one
that computes, so no ring of full buffers can stand still. The kernel says when the other process is gone.
"""

import logging
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from llama4_dist.errors import FrameError, UnavailableError
from llama4_dist.stages.links.defect import defect
from llama4_dist.stages.links.frame import (
    PREFIX_BYTES,
    FrameBounds,
    MessageKind,
    Prefix,
    checksum_of,
    prefix_of,
    read_prefix,
)
from llama4_dist.stages.ports import TIMEOUT_S, worker_lost

log = logging.getLogger(__name__)

_NOTHING = memoryview(b"")
# Given a header and the length of the payload, says where to receive it and what to do when it is there.
Deliver = Callable[[bytearray, int], tuple[memoryview, Callable[[], None]]]


def deliver_nothing(header: bytearray, payload_len: int) -> tuple[memoryview, Callable[[], None]]:
    """Refuse whatever comes by a link that only sends."""
    raise defect("KIND_WRONG", "a message came from who has nothing to say")


class StageLink:
    """Sends from one thread at a time. `deliver` is called in the link's own thread, and so is `on_lost`, once.

    `bounds` are those of what comes; None where the peer has nothing to say.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        *,
        bounds: FrameBounds | None = None,
        deliver: Deliver = deliver_nothing,
        on_lost: Callable[[UnavailableError], None] = lambda error: None,
        send_timeout_s: float = TIMEOUT_S,
    ) -> None:
        connection.settimeout(None)
        # Of the kernel, for the sender alone: the thread that receives waits as long as it takes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(send_timeout_s), 0))
        self.peer = peer
        self.lost: UnavailableError | None = None
        self._connection = connection
        self._bounds = bounds or FrameBounds(kind=MessageKind.PLAN, max_header_bytes=0)
        self._deliver = deliver
        self._on_lost = on_lost
        self._num_sent = 0
        self._thread = threading.Thread(target=self._receive_all, name=f"from-{peer}", daemon=True)

    def start(self) -> None:
        """Begin to receive, if it has not begun."""
        if self._thread.ident is None:
            self._thread.start()

    def send(self, kind: MessageKind, header: bytes, payload: memoryview = _NOTHING) -> None:
        """Send a message; UnavailableError (WORKER_LOST) where the peer is gone, or takes nothing for too long."""
        if self.lost is not None:
            raise self.lost
        prefix = prefix_of(kind, self._num_sent, header, payload)
        self._num_sent += 1
        try:
            self._connection.sendall(prefix + header)
            if len(payload):
                self._connection.sendall(payload)
        except OSError as error:
            raise self._lose(f"{self.peer} is gone: {error.strerror or 'it takes nothing'}") from None

    def close(self) -> None:
        """Hang up: the peer learns it at once. Nothing is delivered after this."""
        self._lose(f"the link to {self.peer} was closed here")
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        self._connection.close()

    def _receive_all(self) -> None:
        sequence = 0
        try:
            while True:
                self._receive_one(sequence)
                sequence += 1
        except FrameError as error:
            log.error("stage_link_broken peer=%s reason=%s", self.peer, error.reason)
            lost = self._lose(f"{self.peer} sent what is no message: {error.reason}")
        except OSError as error:
            lost = self._lose(f"{self.peer} is gone: {error.strerror}")
        self._on_lost(lost)

    def _receive_one(self, sequence: int) -> None:
        prefix: Prefix = read_prefix(self._take(bytearray(PREFIX_BYTES)), sequence, self._bounds)
        header = self._take(bytearray(prefix.header_len))
        payload, done = self._deliver(header, prefix.payload_len)
        if len(payload) != prefix.payload_len:
            raise defect("PAYLOAD_LENGTH", f"{prefix.payload_len} bytes came, {len(payload)} were due")
        self._fill(payload)
        if checksum_of(header, payload) != prefix.checksum:
            raise defect("CHECKSUM_WRONG", "a message was damaged on its way")
        if self.lost is None:
            done()

    def _take(self, memory: bytearray) -> bytearray:
        self._fill(memoryview(memory))
        return memory

    def _fill(self, memory: memoryview) -> None:
        while len(memory):
            received = self._connection.recv_into(memory)
            if not received:
                raise ConnectionResetError(0, "end of file")
            memory = memory[received:]

    def _lose(self, message: str) -> UnavailableError:
        """Remember why the link went down first, and wake whoever waits at either end."""
        self.lost = self.lost or worker_lost(message)
        with suppress(OSError):  # it is down already
            self._connection.shutdown(socket.SHUT_RDWR)
        return self.lost
