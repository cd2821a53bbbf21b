"""A move brings a matrix of values into a block of a new tensor, piece by piece; knows neither layouts nor models.

What the source has no bytes for is not written and stays a hole. Memory is bounded by `PIECE_BYTES` per thread, times
a small factor for the transposed copy.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama4_dist.checkpoint.blocks import Block

PIECE_BYTES = 32 * 1024 * 1024
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Bits = NDArray[Any]  # elements as unsigned integers of their size: nothing here does arithmetic with them


class Source(Protocol):
    """A matrix of elements that can be read by rows."""

    @property
    def num_rows(self) -> int: ...

    @property
    def row_length(self) -> int: ...

    @property
    def row_quantum(self) -> int:
        """Reads that begin and end at multiples of it do no work twice."""

    def read(self, first: int, last: int) -> Bits | None:
        """Return rows [first, last), or None where the source has a hole."""

    def copy_to(self, descriptor: int, offset: int, first: int, last: int) -> bool:
        """Copy rows to byte `offset` of a file without looking at them; False if they do not lie in one run."""


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Two matrices of one shape as one twice as wide: its rows are written at once, not in halves."""

    left: Source
    right: Source

    @property
    def num_rows(self) -> int:
        return self.left.num_rows

    @property
    def row_length(self) -> int:
        return 2 * self.left.row_length

    @property
    def row_quantum(self) -> int:
        return self.left.row_quantum

    def read(self, first: int, last: int) -> Bits | None:
        left, right = self.left.read(first, last), self.right.read(first, last)
        if left is None or right is None:
            have = left if left is not None else right
            if have is None:
                return None
            left, right = (np.zeros_like(have) if half is None else half for half in (left, right))
        return np.concatenate((left, right), axis=1)

    def copy_to(self, descriptor: int, offset: int, first: int, last: int) -> bool:
        return False  # two runs a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """`target` ← `source`, whose rows become the target's columns where `is_transposed`."""

    source: Source
    target: Block
    is_transposed: bool = False

    def __post_init__(self) -> None:
        shape = (self.source.num_rows, self.source.row_length)
        wanted = (self.target.num_rows, self.target.row_length)
        assert shape == (wanted[::-1] if self.is_transposed else wanted), f"{shape} does not fit {wanted}"


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) of a move's source, on their way to the tensor that begins at byte `base` of a file."""

    move: Move
    base: int
    item_bytes: int
    first: int
    last: int

    @property
    def num_bytes(self) -> int:
        return (self.last - self.first) * self.move.source.row_length * self.item_bytes


def pieces(move: Move, base: int, item_bytes: int) -> Iterator[Piece]:
    """Cut a move into pieces of at most about `PIECE_BYTES`."""
    source = move.source
    fitting = max(1, PIECE_BYTES // (source.row_length * item_bytes))
    step = max(source.row_quantum, fitting // source.row_quantum * source.row_quantum)
    for first in range(0, source.num_rows, step):
        yield Piece(move, base, item_bytes, first, min(first + step, source.num_rows))


def carry_out(piece: Piece, descriptor: int) -> None:
    """Write one piece; OSError if the file system refuses, CheckpointError if the source cannot be read."""
    move, target = piece.move, piece.move.target
    if not move.is_transposed and target.is_contiguous:
        offset = piece.base + (target.start + piece.first * target.row_length) * piece.item_bytes
        if move.source.copy_to(descriptor, offset, piece.first, piece.last):
            return
    values = move.source.read(piece.first, piece.last)
    if values is None or not values.any():  # zeros beside a hole need no disk either
        return
    if move.is_transposed:
        start = target.start + piece.first
        block = Block(start, target.num_rows, piece.last - piece.first, target.stride)
        _write(np.ascontiguousarray(values.T), block, piece, descriptor)
    else:
        _write(np.ascontiguousarray(values), target.rows(piece.first, piece.last), piece, descriptor)


def write_all(descriptor: int, raw: memoryview, offset: int) -> None:
    """Write every byte at `offset`; a write that was cut short goes on until the file system says why."""
    while raw:
        written = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[written:], offset + written


def _write(values: Bits, block: Block, piece: Piece, descriptor: int) -> None:
    if block.is_contiguous:
        offset = piece.base + block.start * piece.item_bytes
        write_all(descriptor, values.reshape(-1).view(np.uint8).data, offset)
        return
    for number, row in enumerate(values.view(np.uint8)):
        offset = piece.base + (block.start + number * block.stride) * piece.item_bytes
        write_all(descriptor, row.data, offset)
