"""Dials another process of the group and proves who we are; tries again while the other is not told yet."""

import socket
import time

from llama4_dist.dispatch.challenge import Dialler, failed
from llama4_dist.dispatch.links.address import parse_address
from llama4_dist.dispatch.links.connect import prepare_connection, shake_hands
from llama4_dist.errors import HandshakeError
from llama4_dist.stages.links.door import EXPECTED
from llama4_dist.stages.links.hello import MAGIC, Hello, check_alike, read_hello
from llama4_dist.stages.links.meeting import Meeting
from llama4_dist.stages.ports import worker_lost

RETRY_S = 0.01
Target = tuple[str, int, int]  # address, and the stage and rank that must answer there


def dial(target: Target, meeting: Meeting, purpose: str, *, secret: bytes, deadline: float) -> socket.socket:
    """Return a connection to a place of the group.

    Raises HandshakeError with a reason where a side does not accept the other, WORKER_LOST where nobody answers in
    time or the other is not told of this formation until then.
    """
    while True:
        try:
            return _dial_once(target, meeting, purpose, secret, deadline)
        except HandshakeError as error:
            if error.reason not in EXPECTED:
                raise
            if time.monotonic() + RETRY_S > deadline:
                raise worker_lost(f"stage {target[1]}, rank {target[2]} did not come in time") from None
            time.sleep(RETRY_S)


def _dial_once(target: Target, meeting: Meeting, purpose: str, secret: bytes, deadline: float) -> socket.socket:
    address, stage, rank = target

    def read(body: bytes) -> Hello:
        peer = read_hello(body)
        check_alike(peer, meeting.identity)
        if (peer.stage, peer.rank) != (stage, rank):
            raise failed("PLACE_DIFFERS", f"stage {peer.stage}, rank {peer.rank} answers at {stage}, {rank}'s address")
        return peer

    family, where = parse_address(address)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect(where)
        shake_hands(connection, Dialler(secret, meeting.hello(purpose).pack(), read, magic=MAGIC), deadline)
        prepare_connection(connection)
    except OSError as error:
        connection.close()
        raise worker_lost(f"stage {stage}, rank {rank} does not answer: {error.strerror or error}") from None
    except BaseException:
        connection.close()
        raise
    return connection
