"""One formation of a group as one of its processes sees it: who is expected, who has come. Opens no socket."""

import socket
import threading
import time
from collections.abc import Collection

from llama4_dist.dispatch.challenge import failed
from llama4_dist.stages.links.hello import GroupIdentity, Hello, Purpose, check_alike, hello_of
from llama4_dist.stages.ports import worker_lost

Place = tuple[str, int, int]  # what for, from which stage and rank


class Meeting:
    """Takes each expected link once. Thread-safe."""

    def __init__(self, identity: GroupIdentity, *, stage: int, rank: int, expected: Collection[Place]) -> None:
        self.identity = identity
        self.stage = stage
        self.rank = rank
        self._expected = frozenset(expected)
        self._arrived: dict[Place, socket.socket] = {}
        self._changed = threading.Condition()
        self._over = False

    def hello(self, purpose: str) -> Hello:
        """Return what this process says of itself."""
        return hello_of(self.identity, purpose=purpose, stage=self.stage, rank=self.rank)

    def admit(self, peer: Hello) -> Hello:
        """Return what to answer; HandshakeError with the reason where a peer is not expected."""
        check_alike(peer, self.identity)
        with self._changed:
            if self._over or peer.place not in self._expected:
                raise failed("NOT_EXPECTED", f"nobody waits for {peer.purpose} of stage {peer.stage}, {peer.rank}")
            if peer.place in self._arrived:
                raise failed("DUPLICATE_PEER", f"{peer.purpose} of stage {peer.stage}, {peer.rank} are here already")
        return self.hello(peer.purpose)

    def welcome(self, peer: Hello, connection: socket.socket) -> None:
        """Take a connection that was admitted; one that is of no use any more is closed."""
        with self._changed:
            if self._over or peer.place in self._arrived:
                connection.close()
                return
            self._arrived[peer.place] = connection
            self._changed.notify_all()

    def wait(self, deadline: float) -> dict[Place, socket.socket]:
        """Return all expected connections, which are the caller's then; WORKER_LOST where one is late."""
        with self._changed:
            complete = self._changed.wait_for(
                lambda: self._over or self._arrived.keys() == self._expected, max(0.0, deadline - time.monotonic())
            )
            missing = sorted(self._expected - self._arrived.keys())
            if not complete or missing:
                raise worker_lost(f"nobody dialled for {missing} in time")
            self._over = True
            arrived, self._arrived = self._arrived, {}
            return arrived

    def end(self) -> None:
        """Take nobody any more, and close what has come and was not taken."""
        with self._changed:
            self._over = True
            for connection in self._arrived.values():
                connection.close()
            self._arrived = {}
            self._changed.notify_all()


def expected_of_member(stage: int, rank: int, num_stages: int, num_ranks: int) -> set[Place]:
    """Return the links that others dial to a member: the leader's, the stage's before, those of later ranks."""
    expected: set[Place] = {(Purpose.PLANS, num_stages, 0)}
    if stage > 0:
        expected.add((Purpose.OUTPUTS, stage - 1, rank))
    return expected | {(Purpose.RANKS, stage, later) for later in range(rank + 1, num_ranks)}


def expected_of_leader(num_stages: int, num_ranks: int) -> set[Place]:
    """Return the links that others dial to a leader: those of the last stage."""
    return {(Purpose.OUTPUTS, num_stages - 1, rank) for rank in range(num_ranks)}
