"""Who hears which request of an engine, and who may take one over; plain data: its user holds the lock.

A stream that breaks leaves its requests running as orphans for a while, and one that ended is kept as long, so that
another gateway can attach it. Ids are secrets of the gateways; the digest tells a repeated request from another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from llama4_dist.request import EngineRequest, FinishReason, TokenOutput
from llama4_dist.rpc.kept_request import KeptRequest
from llama4_dist.rpc.run_stream import RunStream


class Claim(Enum):
    """What becomes of a command that names a request."""

    NEW = auto()  # submit it
    ATTACHED = auto()  # its outputs so far are on their way
    EVICT = auto()  # abort the orphan that cannot go on from there, then ask again
    WAIT = auto()  # ask again: its stream may have broken unnoticed, or its abort is under way
    REFUSED = auto()  # taken, or unknown


@dataclass(eq=False, slots=True, kw_only=True)
class RequestLedger:
    """Requests by id.

    `ttl_s` bounds how long orphans run and ends are kept. Of both there are at most `max_kept`, of at most `max_weight`
    tokens: the oldest go first.
    """

    ttl_s: float
    max_kept: int
    max_weight: int
    clock: Callable[[], float]
    _kept: dict[str, KeptRequest] = field(default_factory=dict)
    _expiring: dict[str, KeptRequest] = field(default_factory=dict)  # oldest first: all have the same time to live

    def __len__(self) -> int:
        return len(self._kept)

    def submit(self, request: EngineRequest, stream: RunStream) -> Claim:
        """Claim a request for a stream; one that broke off is attached where the new one wants to go on."""
        kept = self._kept.get(request.request_id)
        position = len(request.output_token_ids)
        if kept is None or (kept.ended and kept.owner is not None):
            return self._begin(request, stream)
        same = kept.is_of(request.digest)
        if kept.aborted:
            return Claim.WAIT
        if kept.owner is not None:
            return Claim.WAIT if same and kept.owner is not stream else Claim.REFUSED
        if same and kept.can_begin_at(position):
            return self._attach(kept, stream, position, attached=False)
        if kept.ended:
            return self._begin(request, stream)
        if not same:
            return Claim.REFUSED
        kept.aborted = True
        return Claim.EVICT

    def attach(self, request_id: str, digest: bytes, stream: RunStream) -> Claim:
        """Claim what runs, or has ended, without a stream."""
        kept = self._kept.get(request_id)
        if kept is None or kept.aborted or not kept.is_of(digest) or not kept.can_begin_at(0):
            return Claim.REFUSED
        if kept.owner is not None:
            return Claim.WAIT
        return self._attach(kept, stream, 0, attached=True)

    def abort(self, request_id: str, stream: RunStream) -> bool:
        """Tell whether a stream may abort the request: its own, or an orphan."""
        kept = self._kept.get(request_id)
        if kept is None or kept.ended or kept.owner not in (stream, None):
            return False
        kept.aborted = True
        return True

    def forget(self, request_id: str) -> None:
        """Drop a request that the engine refused."""
        self._kept.pop(request_id, None)
        self._expiring.pop(request_id, None)

    def leave(self, stream: RunStream) -> list[str]:
        """Make orphans of what a stream has; return the ids to abort."""
        aborted: list[str] = []
        for kept in [kept for kept in self._kept.values() if kept.owner is stream]:
            kept.owner = None
            if self.ttl_s > 0 and kept.may_be_attached and not stream.said_goodbye and not kept.aborted:
                self._let_expire(kept)
            elif kept.ended:
                self.forget(kept.request_id)
            else:
                kept.aborted = True
                aborted.append(kept.request_id)
        return aborted

    def take(self, outputs: Sequence[TokenOutput]) -> dict[RunStream, list[TokenOutput]]:
        """Keep one step's outputs; return those that streams are to be sent."""
        by_stream: dict[RunStream, list[TokenOutput]] = {}
        for output in outputs:
            kept = self._kept.get(output.request_id)
            if kept is None or kept.ended:
                continue
            new = kept.take(output)
            if kept.owner is not None and new is not None:
                by_stream.setdefault(kept.owner, []).append(new)
            if kept.ended:
                self._ended(kept)
        return by_stream

    def expire(self) -> list[str]:
        """Forget what was kept long enough; return the ids to abort."""
        now_s, aborted = self.clock(), []
        weight = sum(kept.weight for kept in self._expiring.values())
        for request_id, kept in list(self._expiring.items()):
            fits = len(self._expiring) <= self.max_kept and weight <= self.max_weight
            if kept.expires_s > now_s and fits:
                break
            weight -= kept.weight
            del self._expiring[request_id]
            if kept.ended:
                del self._kept[request_id]
            else:
                kept.aborted = True
                aborted.append(request_id)
        return aborted

    def _begin(self, request: EngineRequest, stream: RunStream) -> Claim:
        self.forget(request.request_id)
        self._kept[request.request_id] = KeptRequest.of(request, stream)
        return Claim.NEW

    def _attach(self, kept: KeptRequest, stream: RunStream, position: int, *, attached: bool) -> Claim:
        kept.owner = stream
        if not kept.ended:
            self._expiring.pop(kept.request_id, None)
        # Under the caller's lock, so no later output can overtake these.
        for output in kept.catch_up(position, attached=attached):
            stream.send([output])
        return Claim.ATTACHED

    def _ended(self, kept: KeptRequest) -> None:
        # Only a whole answer is worth keeping: what failed or was cancelled is better begun again.
        whole = kept.last is not None and kept.last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if not whole or kept.aborted or not kept.may_be_attached or self.ttl_s == 0:
            self.forget(kept.request_id)
        else:
            self._let_expire(kept)

    def _let_expire(self, kept: KeptRequest) -> None:
        if kept.request_id not in self._expiring:
            kept.expires_s = self.clock() + self.ttl_s
            self._expiring[kept.request_id] = kept
