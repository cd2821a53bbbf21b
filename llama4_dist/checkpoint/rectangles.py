"""Cuts a matrix into cells along the edges of rectangles laid over it, and says who covers each cell; pure."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple


class Rectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right), laid by `worker`."""

    top: int
    bottom: int
    left: int
    right: int
    worker: str


class Cell(NamedTuple):
    """A part of the matrix that no edge crosses, and the workers of all rectangles over it."""

    rows: range
    columns: range
    workers: tuple[str, ...]


def cells(whole: Rectangle, rectangles: Sequence[Rectangle]) -> Iterator[Cell]:
    """Yield the cells of `whole`, and of whatever lies beyond it, in order; together they are all of it, each once."""
    everything = [whole, *rectangles]
    rows = sorted({edge for one in everything for edge in (one.top, one.bottom)})
    starting = sorted(rectangles, key=lambda one: one.top, reverse=True)
    active: list[Rectangle] = []
    for top, bottom in pairwise(rows):
        active = [one for one in active if one.bottom > top]
        while starting and starting[-1].top <= top:
            active.append(starting.pop())
        yield from _strip(range(top, bottom), whole, active)


def _strip(rows: range, whole: Rectangle, active: Sequence[Rectangle]) -> Iterator[Cell]:
    columns = sorted({whole.left, whole.right, *(edge for one in active for edge in (one.left, one.right))})
    for left, right in pairwise(columns):
        workers = tuple(one.worker for one in active if one.left <= left < one.right)
        yield Cell(rows, range(left, right), workers)
