"""Who a peer is and how it proves it: a mutual HMAC-SHA256 challenge with the cluster secret. Does no input or output.

    worker to host   magic 4 | version u16 | zero u16 | nonce 32
    host to worker   the same, with the host's nonce
    worker to host   proof 32 | length u32 | Hello as msgpack
    host to worker   proof 32 | length u32 | Hello as msgpack, or the reason of a refusal

A proof is an HMAC over side, both nonces and every later byte, so it holds for one connection and one Hello, and no
byte of msgpack is parsed before it is checked. The worker proves itself first: a stranger learns nothing.
"""

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from enum import StrEnum

import msgpack

from llama4_dist.dispatch.frame import FrameRules
from llama4_dist.dispatch.links.link import DTYPES, LinkLimits
from llama4_dist.dispatch.links.wire import WireFormat
from llama4_dist.errors import HandshakeError

_MAGIC = b"L4DH"
VERSION = 3
_GREETING = struct.Struct("<4sHH32s")
_PROVEN = struct.Struct("<32sI")
_MAX_HELLO_BYTES = 2048
_MIN_SECRET_BYTES = 16
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
        self._secret = secret
        self._nonce = secrets.token_bytes(32)
        self._peer_nonce = b""
        self._buffer = b""
        self._admit = admit
        self._may_share = may_share

    def feed(self, received: bytes) -> bytes:
        """Take bytes and return the bytes to answer with; HandshakeError means close without an answer."""
        self._buffer += received
        if not self._peer_nonce:
            if len(self._buffer) < _GREETING.size:
                return b""
            self._peer_nonce = _nonce_of(self._take(_GREETING.size))
            return _greeting(self._nonce) + self.feed(b"")
        if len(self._buffer) < _PROVEN.size:
            return b""
        proof, length = _PROVEN.unpack_from(self._buffer)
        if length > _MAX_HELLO_BYTES:
            raise _failed("HELLO_LENGTH", f"a Hello of {length} bytes; at most {_MAX_HELLO_BYTES}")
        if len(self._buffer) < _PROVEN.size + length:
            return b""
        self._take(_PROVEN.size)
        body = self._take(length)
        if self._buffer:
            raise _failed("BYTES_BEFORE_ANSWER", "the peer sent more before it was accepted")
        nonces = self._peer_nonce + self._nonce
        if not hmac.compare_digest(proof, _proof(self._secret, b"worker", nonces, body)):
            raise _failed("SECRET_WRONG", "the peer does not know the cluster secret")
        return self._answer(nonces + body, body)

    def admit_again(self, peer: Hello) -> None:
        """Ask once more whether the peer is wanted, where time has passed since the answer."""
        if self._admit is not None:
            self._admit(peer)

    def _answer(self, transcript: bytes, body: bytes) -> bytes:
        try:
            agreement = _agree(self._hello, self._limits, self._may_share, body, Role.ATTENTION)
            if self._admit is not None:
                self._admit(agreement.peer)
            self.agreement = agreement
            answer = _pack(self._hello, self._limits, self._may_share)
        except HandshakeError as error:
            self.refusal = error.reason
            answer = msgpack.packb([error.reason])
        return _PROVEN.pack(_proof(self._secret, b"host", transcript, answer), len(answer)) + answer

    def _take(self, length: int) -> bytes:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken


class WorkerHandshake:
    """The worker's side: send `greeting`, then `prove` with what came back, then `finish` with the answer."""

    ANSWER_PREFIX_BYTES = _PROVEN.size
    GREETING_BYTES = _GREETING.size

    def __init__(self, hello: Hello, limits: LinkLimits, secret: bytes, *, may_share: bool = False) -> None:
        self._may_share = may_share
        self._hello = hello
        self._limits = limits
        self._secret = secret
        self._nonce = secrets.token_bytes(32)

    def greeting(self) -> bytes:
        return _greeting(self._nonce)

    def prove(self, host_greeting: bytes) -> bytes:
        body = _pack(self._hello, self._limits, self._may_share)
        nonces = self._nonce + _nonce_of(host_greeting)
        self._transcript = nonces + body
        return _PROVEN.pack(_proof(self._secret, b"worker", nonces, body), len(body)) + body

    def answer_len(self, prefix: bytes) -> int:
        """Return how many bytes follow the answer's prefix."""
        length: int = _PROVEN.unpack(prefix)[1]
        if length > _MAX_HELLO_BYTES:
            raise _failed("HELLO_LENGTH", f"an answer of {length} bytes; at most {_MAX_HELLO_BYTES}")
        return length

    def finish(self, prefix: bytes, body: bytes) -> Agreement:
        """Check the host's answer; HandshakeError with the host's reason when it refused."""
        proof = _PROVEN.unpack(prefix)[0]
        if not hmac.compare_digest(proof, _proof(self._secret, b"host", self._transcript, body)):
            raise _failed("SECRET_WRONG", "the host does not know the cluster secret")
        return _agree(self._hello, self._limits, self._may_share, body, Role.EXPERT)


def check_secret(secret: bytes) -> None:
    """Refuse a secret short enough to be guessed."""
    if len(secret) < _MIN_SECRET_BYTES:
        raise ValueError(f"the cluster secret has {len(secret)} bytes; use at least {_MIN_SECRET_BYTES} random ones")


def _greeting(nonce: bytes) -> bytes:
    return _GREETING.pack(_MAGIC, VERSION, 0, nonce)


def _nonce_of(greeting: bytes) -> bytes:
    magic, version, zero, nonce = _GREETING.unpack(greeting)
    if magic != _MAGIC or zero:
        raise _failed("GREETING_WRONG", "the peer does not speak this protocol")
    if version != VERSION:
        raise _failed("PROTOCOL_VERSION", f"the peer speaks protocol version {version}, this build {VERSION}")
    return bytes(nonce)


def _proof(secret: bytes, side: bytes, transcript: bytes, body: bytes) -> bytes:
    return hmac.new(secret, side + b"\0" + transcript + body, hashlib.sha256).digest()


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
        values = msgpack.unpackb(body, max_str_len=_MAX_HELLO_BYTES, max_array_len=16, max_map_len=0, max_ext_len=0)
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


def _failed(reason: str, message: str) -> HandshakeError:
    return HandshakeError(message, reason=reason)
