"""Who a process of an attention group is and what both ends of a link must have alike. Does no input or output.

msgpack, the fields of Hello in their order; a refusal is [reason]
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from enum import StrEnum

import msgpack

from llama4_dist.dispatch.challenge import MAX_HELLO_BYTES, failed
from llama4_dist.errors import HandshakeError
from llama4_dist.stages.links.frame import VERSION

MAGIC = b"L4DS"
LEADER = "leader"
_MAX_TEXT = 128
_ALIKE = (
    "messages",
    "group",
    "formation",
    "model_hash",
    "num_stages",
    "num_ranks",
    "num_pages",
    "block_size",
    "dtype",
    "weights",
    "arithmetic",
)
_REMEDIES = {
    "messages": ": start all processes of a group from one build",
    "formation": ": the group is being formed anew",
    "arithmetic": ": give every node a C++ compiler, or none, and all members the same device",
}


class Purpose(StrEnum):
    """What a link is for, said by who dials."""

    PLANS = "plans"  # leader to member
    OUTPUTS = "outputs"  # member to the next stage, or to the leader
    RANKS = "ranks"  # a rank to those before it, while they meet


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupIdentity:
    """What all processes of a group have alike. `formation` rises each time the group is formed anew.

    `messages` is the version of what they say to each other (`frame.VERSION`).
    """

    group: str
    formation: int
    model_hash: str
    num_stages: int
    num_ranks: int
    num_pages: int
    block_size: int
    dtype: str
    weights: str
    arithmetic: str
    messages: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a process says of itself and of the link; the leader's stage is `num_stages`, where outputs end."""

    purpose: str
    stage: int
    rank: int
    messages: int
    group: str
    formation: int
    model_hash: str
    num_stages: int
    num_ranks: int
    num_pages: int
    block_size: int
    dtype: str
    weights: str
    arithmetic: str

    @property
    def place(self) -> tuple[str, int, int]:
        """Which link of the receiver this is."""
        return self.purpose, self.stage, self.rank

    def pack(self) -> bytes:
        """Write it."""
        packed: bytes = msgpack.packb(astuple(self))
        return packed


def hello_of(identity: GroupIdentity, *, purpose: str, stage: int, rank: int) -> Hello:
    """Return what a process of a group says."""
    return Hello(purpose=purpose, stage=stage, rank=rank, **{name: getattr(identity, name) for name in _ALIKE})


def read_hello(body: bytes) -> Hello:
    """Read a Hello; HandshakeError with the peer's reason where it refused, and for what is none."""
    try:
        values = msgpack.unpackb(body, max_str_len=MAX_HELLO_BYTES, max_array_len=16, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException):
        raise failed("HELLO_NOT_MSGPACK", "the peer's Hello is no msgpack array") from None
    if type(values) is list and len(values) == 1 and type(values[0]) is str:
        raise failed(values[0][:_MAX_TEXT], f"the peer refused: {values[0][:_MAX_TEXT]}")
    names = [(field.name, field.type) for field in fields(Hello)]
    if type(values) is not list or [type(value) for value in values] != [kind for _, kind in names]:
        raise failed("HELLO_SHAPE", f"the peer's Hello is no array of {len(names)} fields of the right types")
    if any(type(value) is int and not 0 <= value < 1 << 63 for value in values):
        raise failed("HELLO_RANGE", "a number of the peer's Hello is negative or too large")
    return Hello(**{name: value for (name, _), value in zip(names, values, strict=True)})


def check_alike(peer: Hello, own: GroupIdentity) -> None:
    """Raise HandshakeError with a reason where a peer belongs to another group, formation, model or cut."""
    for name in _ALIKE:
        theirs, ours = getattr(peer, name), getattr(own, name)
        if theirs != ours:
            message = f"the peer's {name} is {theirs!r}, ours {ours!r}{_REMEDIES.get(name, '')}"
            raise failed(f"{name.upper()}_DIFFERS", message)


class Acceptance:
    """Answers the Hello of who dialled, once it is proved; `peer` is who was taken, `refusal` why nobody was.

    `admit` returns what to say of this process, or raises HandshakeError for a peer that is not wanted.
    """

    def __init__(self, admit: Callable[[Hello], Hello]) -> None:
        self.peer: Hello | None = None
        self.refusal = ""
        self._admit = admit

    def answer(self, body: bytes) -> bytes:
        try:
            peer = read_hello(body)
            own = self._admit(peer)
        except HandshakeError as error:
            self.refusal = error.reason
            refused: bytes = msgpack.packb([error.reason])
            return refused
        self.peer = peer
        return own.pack()
