"""Says what is wrong with one value, in words a caller can act on; knows no request."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama4_dist.errors import FieldViolation, InvalidRequestError

MAX_SHOWN = 80  # characters of a caller's value that a message carries back


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The closed (or, where `exclusive`, left-open) interval one number must lie in."""

    kind: type[int] | type[float]
    low: float
    high: float
    exclusive: bool = False
    optional: bool = False

    def problem(self, value: object) -> str | None:
        """Say what is wrong with `value`, or None."""
        if value is None and self.optional:
            return None
        accepted = (int,) if self.kind is int else (int, float)
        # bool is an int to Python, and True tokens is no count.
        if isinstance(value, accepted) and not isinstance(value, bool) and self._holds(value):
            return None
        noun = "a whole number" if self.kind is int else "a number"
        start = "above" if self.exclusive else "from"
        return f"must be {noun} {start} {self.low} to {self.high}, not {shown(value)}"

    def _holds(self, value: float) -> bool:
        # Comparisons with NaN are all False.
        return (self.low < value if self.exclusive else self.low <= value) and value <= self.high


def text_problem(text: object, max_bytes: int) -> str | None:
    """Say why `text` is no valid Unicode string of 1 to `max_bytes` bytes of UTF-8, or None."""
    if not isinstance(text, str):
        return f"must be a string, not {shown(text)}"
    if len(text) > max_bytes:
        return f"has more than {max_bytes} bytes, the limit"
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate at character {error.start}, which is no valid Unicode"
    return f"has {num_bytes} bytes; at most {max_bytes} are allowed" if num_bytes > max_bytes else None


def outside_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int) -> Iterator[FieldViolation]:
    """Yield the first id that is no whole number from 0 to vocab_size - 1: a million violations tell no more."""
    # One pass in C for the common case, since a prompt may hold millions of ids.
    if not token_ids:
        return
    if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    for index, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            description = f"must be a token id from 0 to {vocab_size - 1}, not {shown(token_id)}"
            yield violation(f"{field}[{index}]", description)
            return


def shown(value: object) -> str:
    """Return a short, printable form: a message must not carry a caller's megabytes back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[:MAX_SHOWN]
    text = ascii(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def violation(field: str, description: str) -> FieldViolation:
    """Return one refused field."""
    return FieldViolation(field=field, description=description)


def raise_any(violations: Sequence[FieldViolation], *, reason: str | None = None) -> None:
    """Raise InvalidRequestError if there is any violation."""
    if violations:
        raise InvalidRequestError(violations, reason=reason)
