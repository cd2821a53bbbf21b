"""Where the other processes of a group dial: sockets with the cluster secret, and who has not proved itself yet.

A stranger costs at most one of `MAX_HALF_OPEN` places, a few kilobytes, and no longer than the handshake may take.
"""

import logging
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence

from llama4_dist.dispatch.challenge import Acceptor, failed
from llama4_dist.dispatch.links.connect import prepare_connection
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.errors import HandshakeError
from llama4_dist.stages.links.hello import MAGIC, Acceptance, Hello
from llama4_dist.stages.links.meeting import Meeting

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_HALF_OPEN = 64
NOT_FORMING = "NOT_FORMING"
_READ_BYTES = 4096
_SWEEP_S = 0.25


class _HalfOpen:
    """A connection whose handshake is not finished. Never blocks."""

    def __init__(self, connection: socket.socket, door: "Door") -> None:
        connection.setblocking(False)
        self.connection = connection
        self.deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        self.acceptance = Acceptance(door.admit)
        self._acceptor = Acceptor(door.secret, self.acceptance.answer, magic=MAGIC)

    def advance(self) -> Hello | None:
        """Take what has come; return who it is once it is accepted. HandshakeError means close."""
        try:
            received = self.connection.recv(_READ_BYTES)
            if not received:
                raise failed("HANDSHAKE_ABANDONED", "the peer closed before it proved itself")
            answer = self._acceptor.feed(received)
            # The answers are a few hundred bytes on an empty connection: the kernel takes them whole.
            if answer and self.connection.send(answer) < len(answer):
                raise failed("HANDSHAKE_ABANDONED", "the peer does not read")
        except BlockingIOError:
            return None
        except OSError:
            raise failed("HANDSHAKE_ABANDONED", "the peer is gone") from None
        if self.acceptance.refusal:
            raise failed(self.acceptance.refusal, "the peer was refused")
        return self.acceptance.peer


class Door:
    """Accepts for the `meeting` of now, from a thread of its own. `closed` counts who was sent away, by reason."""

    def __init__(self, listeners: Sequence[Listener], *, secret: bytes) -> None:
        self.secret = secret
        self.meeting: Meeting | None = None
        self.closed: Counter[str] = Counter()
        self._listeners = {listener.socket.fileno(): listener for listener in listeners}
        self._half_open: dict[int, _HalfOpen] = {}
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        for descriptor in (*self._listeners, self._bell.fileno()):
            self._selector.register(descriptor, selectors.EVENT_READ)
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="stage-door", daemon=True)
        self._thread.start()

    def admit(self, peer: Hello) -> Hello:
        """Ask the meeting of now."""
        meeting = self.meeting
        if meeting is None:
            raise failed(NOT_FORMING, "this process forms no group now")
        return meeting.admit(peer)

    def close(self) -> None:
        """Accept nobody any more."""
        self._stop = True
        self._rope.send(b"\0")
        self._thread.join()
        for descriptor in tuple(self._half_open):
            self._send_away(descriptor, "STOPPED")
        self._selector.close()
        self._bell.close()
        self._rope.close()
        for listener in self._listeners.values():
            listener.close()

    def _run(self) -> None:
        while not self._stop:
            for key, _ in self._selector.select(_SWEEP_S):
                if key.fd in self._listeners:
                    self._accept(self._listeners[key.fd])
                elif key.fd in self._half_open:
                    self._advance(key.fd)
            now_s = time.monotonic()
            for descriptor in [fd for fd, one in self._half_open.items() if now_s > one.deadline]:
                self._send_away(descriptor, "HANDSHAKE_TIMEOUT")

    def _accept(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except OSError:  # the peer has gone already, or no descriptor is free
            return
        if len(self._half_open) >= MAX_HALF_OPEN:
            self.closed["TOO_MANY_HALF_OPEN"] += 1
            connection.close()
            return
        self._half_open[connection.fileno()] = _HalfOpen(connection, self)
        self._selector.register(connection, selectors.EVENT_READ)

    def _advance(self, descriptor: int) -> None:
        half_open = self._half_open[descriptor]
        try:
            peer = half_open.advance()
        except HandshakeError as error:
            self._send_away(descriptor, error.reason)
            return
        if peer is None:
            return
        self._selector.unregister(descriptor)
        del self._half_open[descriptor]
        meeting = self.meeting
        if meeting is None:
            half_open.connection.close()
            return
        prepare_connection(half_open.connection)
        meeting.welcome(peer, half_open.connection)

    def _send_away(self, descriptor: int, reason: str) -> None:
        log.log(logging.DEBUG if reason in EXPECTED else logging.WARNING, "stage_refused reason=%s", reason)
        self.closed[reason] += 1
        self._selector.unregister(descriptor)
        self._half_open.pop(descriptor).connection.close()


# Of members that are told of a formation a little earlier than this one; they dial again.
EXPECTED = frozenset({NOT_FORMING, "FORMATION_DIFFERS"})
