"""Cuts lists into pages and reads the numbers of a request; pure, and the same for every method of the admin port."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from llama4_dist.errors import FieldViolation, InvalidRequestError

Item = TypeVar("Item")


def invalid(field: str, description: str) -> InvalidRequestError:
    """Build the error of one field."""
    return InvalidRequestError([FieldViolation(field=field, description=description)])


def page(
    items: Sequence[Item], name: Callable[[Item], str], *, size: int, token: str, default: int, most: int
) -> tuple[Sequence[Item], str]:
    """Return the page after the item that `token` names, and the token of the next; "" when there is none."""
    if not 0 <= size <= most:
        raise invalid("page_size", f"must be 0 to {most}, not {size}")
    begin = 0
    if token:
        begin = next((at + 1 for at, item in enumerate(items) if name(item) == token), 0)
        if begin == 0:
            raise invalid("page_token", "the list has changed since it was given: begin again without one")
    end = begin + (size or default)
    return items[begin:end], name(items[end - 1]) if end < len(items) else ""


def seconds(field: str, given: Duration | None, *, default: float, least: float, most: float) -> float:
    """Read a duration; None stands for an absent one."""
    if given is None:
        return default
    value = given.seconds + given.nanos / 1e9
    if not least <= value <= most:
        raise invalid(field, f"must be {least:g} s to {most:g} s, not {value:g} s")
    return value


def to_duration(value: float) -> Duration:
    """Write a duration."""
    written = Duration()
    written.FromNanoseconds(round(value * 1e9))
    return written
