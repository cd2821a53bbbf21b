"""Reaches an expert host over a socket: dials, proves who we are, and makes the link. Routes nothing."""

import logging
import socket
import time

from llama4_dist.dispatch.challenge import Agreed, Dialler, check_secret
from llama4_dist.dispatch.handshake import Hello, WorkerHandshake
from llama4_dist.dispatch.links.address import parse_address
from llama4_dist.dispatch.links.link import DTYPES, Link, LinkLimits
from llama4_dist.dispatch.links.shared_rows import MEMORIES, close_all, is_possible, make_memories
from llama4_dist.dispatch.links.socket import SocketLink
from llama4_dist.dispatch.links.wire import WireFormat, WireLink
from llama4_dist.errors import HandshakeError, LinkDownError

log = logging.getLogger(__name__)

_BUFFER_BYTES = 4 * 1024 * 1024  # asked of the kernel, which may give less
_KEEPALIVE_S = 2  # at rest, before the kernel asks whether the peer is still there, and between two such questions
_KEEPALIVE_PROBES = 3


def connect(address: str, *, hello: Hello, secret: bytes, limits: LinkLimits, timeout_s: float) -> Link:
    """Do what `connect_plain` does; rows of the link are the model's, however they travel."""
    link = connect_plain(address, hello=hello, secret=secret, limits=limits, timeout_s=timeout_s)
    form = WireFormat(hello.wire, hello.width, DTYPES[hello.dtype])
    return WireLink(link, form) if form.wire else link


def connect_plain(address: str, *, hello: Hello, secret: bytes, limits: LinkLimits, timeout_s: float) -> SocketLink:
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
        may_share = family == socket.AF_UNIX and limits.shared_from_bytes > 0 and is_possible()
        agreement = shake_hands(connection, WorkerHandshake(hello, limits, secret, may_share=may_share), deadline)
        prepare_connection(connection)
        if not agreement.shares:
            return SocketLink(connection, agreement, initiator=True)
        try:
            memories = make_memories(agreement.rules, agreement.limits.credit)
        except OSError as error:  # no memory is to be had, or no descriptor
            log.warning("rows_not_shared host=%s reason=%s", agreement.peer.id, error.strerror)
            connection.sendall(MEMORIES)
            return SocketLink(connection, agreement, initiator=True)
        try:
            socket.send_fds(connection, [MEMORIES], memories)
            return SocketLink(connection, agreement, initiator=True, memories=memories)
        finally:
            close_all(memories)
    except OSError as error:
        connection.close()
        raise LinkDownError(f"no link to {address}: {error}") from None
    except BaseException:
        connection.close()
        raise


def shake_hands(connection: socket.socket, handshake: Dialler[Agreed], deadline: float) -> Agreed:
    """Prove who we are on a connection just made, and return what was agreed; HandshakeError, OSError."""
    connection.sendall(handshake.greeting())
    connection.sendall(handshake.prove(_receive_exactly(connection, Dialler.GREETING_BYTES, deadline)))
    prefix = _receive_exactly(connection, Dialler.ANSWER_PREFIX_BYTES, deadline)
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


def prepare_connection(connection: socket.socket) -> None:
    """Send small frames at once, and give large ones room: each refill of the kernel's buffer costs two wake-ups.

    A peer that went away behind a broken network says nothing: asking now and then tells a link at rest from a dead
    one.
    """
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    else:  # TCP sizes its buffers itself, and better, as long as nobody sets them
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
