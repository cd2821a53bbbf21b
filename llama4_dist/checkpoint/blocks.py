"""Strided two-dimensional ranges of a tensor's elements; pure arithmetic that knows neither files nor models.

A reader maps a block, a writer copies it, and the proof of coverage counts it: all three mean the same elements.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Block:
    """`num_rows` runs of `row_length` elements; the first begins at element `start`, each next one `stride` later."""

    start: int
    num_rows: int
    row_length: int
    stride: int

    @property
    def stop(self) -> int:
        """The element behind the last one."""
        return self.start + (self.num_rows - 1) * self.stride + self.row_length

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.row_length

    @property
    def is_contiguous(self) -> bool:
        return self.num_rows == 1 or self.stride == self.row_length

    def each_row(self) -> Iterator["Block"]:
        """Yield the rows one by one."""
        return (self.rows(row, row + 1) for row in range(self.num_rows))

    def rows(self, first: int, last: int) -> "Block":
        """Return rows [first, last)."""
        return Block(self.start + first * self.stride, last - first, self.row_length, self.stride)


def matrix_block(
    shape: tuple[int, ...], index: int | None = None, *, rows: range | None = None, columns: range | None = None
) -> Block:
    """Return rows and columns (all by default) of a tensor seen as a matrix, or of matrix `index` of a stack."""
    row_length = shape[-1]
    rows = range(prod(shape[:-1]) if index is None else shape[-2]) if rows is None else rows
    columns = range(row_length) if columns is None else columns
    start = ((index or 0) * (shape[-2] if index is not None else 0) + rows.start) * row_length + columns.start
    return Block(start, len(rows), len(columns), row_length)
