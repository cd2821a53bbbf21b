"""Where workers connect to: a bound socket with the cluster secret, and connections not proved yet.

A stranger costs at most one of `max_half_open` places, a few kilobytes, and no longer than the handshake timeout.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from llama4_dist.dispatch.challenge import check_secret
from llama4_dist.dispatch.handshake import Agreement, Hello, HostHandshake
from llama4_dist.dispatch.links.address import address_of, bind
from llama4_dist.dispatch.links.connect import prepare_connection
from llama4_dist.dispatch.links.link import LinkLimits
from llama4_dist.dispatch.links.shared_rows import MEMORIES, close_all, is_possible
from llama4_dist.dispatch.links.socket import SocketLink
from llama4_dist.errors import HandshakeError

log = logging.getLogger(__name__)

_READ_BYTES = 4096


class Listener:
    """A listening address; `address` is what to connect to, with the real port where 0 was asked for."""

    def __init__(self, address: str, *, secret: bytes, backlog: int = 128) -> None:
        check_secret(secret)
        self.secret = secret
        self.socket = bind(address, backlog)
        self.address = address_of(self.socket)
        self.shares = self.socket.family == socket.AF_UNIX and is_possible()  # memory, with those who connect

    def close(self) -> None:
        self.socket.close()
        if self.address.startswith("unix:"):
            Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)


class HalfOpen:
    """A connection whose handshake is not finished. Never blocks."""

    def __init__(self, connection: socket.socket, handshake: HostHandshake, deadline: float) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.deadline = deadline
        self._handshake = handshake

    def advance(self) -> SocketLink | None:
        """Take what has arrived; return the link once the peer is accepted. HandshakeError means close."""
        try:
            if self._handshake.agreement is not None:
                return self._take_memories(self._handshake.agreement)
            received = self.connection.recv(_READ_BYTES)
            if not received:
                raise HandshakeError("the peer closed before it proved itself", reason="HANDSHAKE_ABANDONED")
            answer = self._handshake.feed(received)
            # The answers are a few hundred bytes on an empty connection: the kernel takes them whole.
            if answer and self.connection.send(answer) < len(answer):
                raise HandshakeError("the peer does not read", reason="HANDSHAKE_ABANDONED")
        except BlockingIOError:
            return None
        except OSError:
            raise HandshakeError("the peer is gone", reason="HANDSHAKE_ABANDONED") from None
        if self._handshake.refusal:
            raise HandshakeError("the peer was refused", reason=self._handshake.refusal)
        agreement = self._handshake.agreement
        if agreement is None or agreement.shares:
            return None
        prepare_connection(self.connection)
        return SocketLink(self.connection, agreement, initiator=False)

    def _take_memories(self, agreement: Agreement) -> SocketLink:
        """Take the descriptors of the memories to share, which come in one message; none = the worker could not."""
        message, memories, flags, _ = socket.recv_fds(self.connection, len(MEMORIES), 2, socket.MSG_CMSG_CLOEXEC)
        try:
            if message != MEMORIES or flags & socket.MSG_CTRUNC:
                raise HandshakeError("no memories to share came", reason="SHARED_MEMORY_WRONG")
            self._handshake.admit_again(agreement.peer)
            prepare_connection(self.connection)
            return SocketLink(self.connection, agreement, initiator=False, memories=memories or None)
        finally:
            close_all(memories)


class Lobby:
    """All connections of a server that are not links yet, by descriptor."""

    def __init__(self, hello: Hello, limits: LinkLimits, admit: Callable[[Hello], None], closed: Counter[str]) -> None:
        self.half_open: dict[int, HalfOpen] = {}
        self._hello = hello
        self._limits = limits
        self._admit = admit
        self._closed = closed  # counts connections closed here, per reason

    def accept(self, listener: Listener) -> list[int]:
        """Accept everybody who waits; return the descriptors to watch. Beyond the limit, connections are closed."""
        accepted: list[int] = []
        for _ in range(self._limits.max_half_open):
            try:
                connection, _ = listener.socket.accept()
            except OSError:  # nobody is left, or the peer has gone already, or no descriptor is free
                break
            if len(self.half_open) >= self._limits.max_half_open:
                self._closed["TOO_MANY_HALF_OPEN"] += 1
                connection.close()
                continue
            may_share = listener.shares and self._limits.shared_from_bytes > 0
            handshake = HostHandshake(self._hello, self._limits, listener.secret, self._admit, may_share=may_share)
            deadline = time.monotonic() + self._limits.handshake_timeout_s
            self.half_open[connection.fileno()] = HalfOpen(connection, handshake, deadline)
            accepted.append(connection.fileno())
        return accepted

    def advance(self, descriptor: int) -> SocketLink | None:
        """Go on with one handshake; return the link when it is done. A failed one is closed and counted."""
        half_open = self.half_open[descriptor]
        try:
            link = half_open.advance()
        except HandshakeError as error:
            self._close(descriptor, error.reason)
            return None
        if link is not None:
            del self.half_open[descriptor]
        return link

    def sweep(self) -> None:
        """Close connections that took too long."""
        now = time.monotonic()
        for descriptor in [fd for fd, half_open in self.half_open.items() if now > half_open.deadline]:
            self._close(descriptor, "HANDSHAKE_TIMEOUT")

    def close(self) -> None:
        for descriptor in list(self.half_open):
            self._close(descriptor, "SERVER_STOPPED")

    def _close(self, descriptor: int, reason: str) -> None:
        log.warning("handshake_failed reason=%s", reason)
        self._closed[reason] += 1
        self.half_open.pop(descriptor).connection.close()
