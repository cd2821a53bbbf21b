"""Who a peer of a link to an expert host is, and on what both sides agree. Does no input or output.

How each proves that it knows the cluster secret is `challenge`'s.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from enum import StrEnum

import msgpack

from llama4_dist.dispatch.challenge import MAX_HELLO_BYTES, Acceptor, Dialler
from llama4_dist.dispatch.challenge import failed as _failed
from llama4_dist.dispatch.frame import FrameRules
from llama4_dist.dispatch.links.link import DTYPES, LinkLimits
from llama4_dist.dispatch.links.wire import WireFormat
from llama4_dist.errors import HandshakeError

_MAGIC = b"L4DH"
_MAX_ID = 128
_REMEDIES = {
    "num_slices": ": start all workers of a cluster with the same `expert_slices`",
    "arithmetic": ": give every node a C++ compiler, or none (LLAMA4_DIST_NATIVE=0), and all workers the same "
    "`weights` and the same `device`",
}


class Role(StrEnum):
    ATTENTION = "attention"
    EXPERT = "expert"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIdentity:
    """What an expert host is: its id, which life of it this is, and the model it serves."""

    host: str
    incarnation: int
    model_hash: str
    num_layers: int
    num_experts: int
    num_slices: int = 1
    arithmetic: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a peer says of itself. Both sides must agree on everything from `model_hash` on."""

    role: str
    id: str
    incarnation: int
    model_hash: str
    width: int  # D
    dtype: str
    num_layers: int
    num_experts: int  # E
    num_slices: int = 1  # into which every expert is cut: frames name units, see `units`
    wire: str = ""  # how rows travel, see links/wire.py
    arithmetic: str = ""  # what computes: two kinds round differently, and tokens would depend on who computed them

    def __post_init__(self) -> None:
        if not 0 < len(self.id) <= _MAX_ID:
            raise ValueError(f"id of {len(self.id)} characters; 1 to {_MAX_ID} are allowed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What both sides hold to after a handshake: who the other one is, and the smaller of both sides' limits."""

    peer: Hello
    limits: LinkLimits
    shares: bool = False  # the worker sends memories to share rows in before its first frame

    @property
    def form(self) -> WireFormat:
        return WireFormat(self.peer.wire, self.peer.width, DTYPES[self.peer.dtype])

    @property
    def rules(self) -> FrameRules:
        form = self.form
        return FrameRules(
            width=form.wire_width,
            dtype=form.wire_dtype,
            num_layers=self.peer.num_layers,
            num_experts=self.peer.num_experts * self.peer.num_slices,
            max_rows=self.limits.max_rows,
            max_header_bytes=self.limits.max_header_bytes,
        )


class HostHandshake:
    """The host's side of one connection: `feed` it what arrives, send what it returns, until `agreement` is there.

    `admit` may raise HandshakeError for a peer that proved itself but is not wanted; it is told the reason.
    """

    def __init__(
        self,
        hello: Hello,
        limits: LinkLimits,
        secret: bytes,
        admit: Callable[[Hello], None] | None = None,
        *,
        may_share: bool = False,
    ) -> None:
        self.agreement: Agreement | None = None
        self.refusal = ""  # why the peer, though it knows the secret, is not taken; send the answer, then close
        self._hello = hello
        self._limits = limits
        self._admit = admit
        self._may_share = may_share
        self._challenge = Acceptor(secret, self._answer, magic=_MAGIC)

    def feed(self, received: bytes) -> bytes:
        """Take bytes and return the bytes to answer with; HandshakeError means close without an answer."""
        return self._challenge.feed(received)

    def admit_again(self, peer: Hello) -> None:
        """Ask once more whether the peer is wanted, where time has passed since the answer."""
        if self._admit is not None:
            self._admit(peer)

    def _answer(self, body: bytes) -> bytes:
        try:
            agreement = _agree(self._hello, self._limits, self._may_share, body, Role.ATTENTION)
            if self._admit is not None:
                self._admit(agreement.peer)
            self.agreement = agreement
            return _pack(self._hello, self._limits, self._may_share)
        except HandshakeError as error:
            self.refusal = error.reason
            refusal: bytes = msgpack.packb([error.reason])
            return refusal


class WorkerHandshake(Dialler[Agreement]):
    """The worker's side of one connection."""

    def __init__(self, hello: Hello, limits: LinkLimits, secret: bytes, *, may_share: bool = False) -> None:
        def read(body: bytes) -> Agreement:
            return _agree(hello, limits, may_share, body, Role.EXPERT)

        super().__init__(secret, _pack(hello, limits, may_share), read, magic=_MAGIC)


def _pack(hello: Hello, limits: LinkLimits, may_share: bool) -> bytes:
    counts = (limits.max_rows, limits.credit, limits.max_header_bytes, int(may_share))
    packed: bytes = msgpack.packb((*astuple(hello), *counts))
    return packed


def _agree(own: Hello, limits: LinkLimits, may_share: bool, body: bytes, role: Role) -> Agreement:
    """Parse the peer's Hello and compare it with ours."""
    peer, max_rows, credit, max_header_bytes, peer_may_share = _parse(body)
    if peer.role != role:
        raise _failed("ROLE_WRONG", f"the peer is {peer.role!r}; {role} was expected")
    for field in ("model_hash", "width", "dtype", "num_layers", "num_experts", "num_slices", "wire", "arithmetic"):
        theirs, ours = getattr(peer, field), getattr(own, field)
        if theirs != ours:
            remedy = _REMEDIES.get(field, "")
            raise _failed(f"{field.upper()}_DIFFERS", f"the peer's {field} is {theirs!r}, ours {ours!r}{remedy}")
    try:
        agreed = replace(
            limits,
            max_rows=min(limits.max_rows, max_rows),
            credit=min(limits.credit, credit),
            max_header_bytes=min(limits.max_header_bytes, max_header_bytes),
        )
    except ValueError as error:
        raise _failed("LIMITS_WRONG", str(error)) from None
    return Agreement(peer=peer, limits=agreed, shares=may_share and peer_may_share == 1)


def _parse(body: bytes) -> tuple[Hello, int, int, int, int]:
    try:
        values = msgpack.unpackb(body, max_str_len=MAX_HELLO_BYTES, max_array_len=16, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException):
        raise _failed("HELLO_NOT_MSGPACK", "the peer's Hello is no msgpack array") from None
    if type(values) is list and len(values) == 1 and type(values[0]) is str:
        remedy = _REMEDIES.get(values[0].removesuffix("_DIFFERS").lower(), "")
        raise _failed(values[0], f"the host refused: {values[0]}{remedy}")
    kinds = (str, str, int, str, int, str, int, int, int, str, str, int, int, int, int)
    if type(values) is not list or [type(value) for value in values] != list(kinds):
        raise _failed("HELLO_SHAPE", f"the peer's Hello is no array of {len(kinds)} fields of the right types")
    if any(type(value) is int and not 0 <= value < 1 << 63 for value in values):
        raise _failed("HELLO_RANGE", "a field of the peer's Hello is negative or too large")
    names = [field.name for field in fields(Hello)]
    try:
        return Hello(**dict(zip(names, values, strict=False))), *values[len(names) :]
    except ValueError as error:
        raise _failed("HELLO_RANGE", str(error)) from None
