"""A closed list of errors that stages tell each other, as plain values; nothing from a socket names a class."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama4_dist.errors import (
    DeadlineExceededError,
    EngineError,
    Llama4Error,
    OverloadedError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from llama4_dist.stages.links.defect import defect

MAX_MESSAGE = 1024
MAX_REASON = 64

# A number is never given anew: members of two builds may meet, and then only the handshake's version parts them.
_KINDS: Mapping[int, type[Llama4Error]] = {
    1: EngineError,
    2: UnavailableError,
    3: OverloadedError,
    4: DeadlineExceededError,
    5: UnsupportedError,
    6: PreconditionError,
}


def error_to_wire(error: Llama4Error) -> tuple[int, str, str, float]:
    """Write an error; a class that is not on the list becomes an EngineError, whose log is the sender's."""
    kind = next((number for number, one in _KINDS.items() if type(error) is one), None)
    kind = kind or next((number for number, one in _KINDS.items() if isinstance(error, one)), 1)
    return kind, error.reason[:MAX_REASON], error.message[:MAX_MESSAGE], error.retry_after_s or 0.0


def error_from_wire(fields: Sequence[Any]) -> Llama4Error:
    """Read what `error_to_wire` wrote; FrameError for anything else."""
    if [type(field) for field in fields] != [int, str, str, float]:
        raise defect("ERROR_SHAPE", "an error that is no [kind, reason, message, seconds] came from a stage")
    kind, reason, message, retry_after_s = fields
    if kind not in _KINDS or not 0 < len(reason) <= MAX_REASON or len(message) > MAX_MESSAGE:
        raise defect("ERROR_RANGE", f"an error of kind {kind} came from a stage, which is none of {sorted(_KINDS)}")
    if not 0.0 <= retry_after_s <= 3600.0:
        raise defect("ERROR_RANGE", f"an error came from a stage that asks to wait {retry_after_s} s")
    return _KINDS[kind](message, reason=reason, retry_after_s=retry_after_s or None)
