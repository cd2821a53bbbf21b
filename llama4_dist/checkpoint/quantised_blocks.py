"""States which stored elements make up a quantised linear, or a cut of it; pure.

The reader maps what it says, the proof of coverage counts it, and a part for one host is cut along it. Packed integers
are seen as bytes: a cut between two words is none between two bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama4_dist.checkpoint.blocks import Block, matrix_block
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.quantised_tensors import QuantisedEntry
from llama4_dist.checkpoint.scheme import Scheme

Place = tuple[TensorEntry, Block]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedBlocks:
    """Where the numbers and the scales [F, G] of a cut lie; `width` are its inputs."""

    width: int
    stored: Place
    scales: Place

    def places(self) -> Iterator[Place]:
        yield self.stored
        yield self.scales


def quantised_blocks(
    entry: QuantisedEntry, scheme: Scheme, *, rows: range | None = None, columns: range | None = None
) -> QuantisedBlocks:
    """Return where outputs `rows` and inputs `columns` of a linear lie; all by default.

    Raise ValueError for columns that cut a group of inputs, which share a scale, or a byte.
    """
    num_outputs, width = entry.shape
    columns = range(width) if columns is None else columns
    check_cut(columns, width, scheme)
    stored = as_bytes(entry.stored) if scheme.is_packed else entry.stored
    bits = scheme.number.bits if scheme.is_packed else 8
    end = stored.shape[1] if columns.stop == width else columns.stop * bits // 8  # the last bytes may be padding
    numbers = matrix_block(stored.shape, rows=rows, columns=range(columns.start * bits // 8, end))
    scales = replace(entry.scale, shape=(num_outputs, scheme.num_groups(width)))
    size = scheme.group_size
    groups = None if size is None else range(columns.start // size, columns.stop // size)
    return QuantisedBlocks(
        width=len(columns),
        stored=(stored, numbers),
        scales=(scales, matrix_block(scales.shape, rows=rows, columns=groups)),
    )


def as_bytes(entry: TensorEntry) -> TensorEntry:
    """Return a matrix as one of bytes."""
    return replace(entry, dtype="U8", shape=(entry.shape[0], entry.num_bytes // entry.shape[0]))


def check_cut(columns: range, width: int, scheme: Scheme) -> None:
    """Raise ValueError for inputs that cannot be taken out of `width` without cutting a group or a byte."""
    unit = scheme.cut_unit
    if columns.start % unit or (columns.stop % unit and columns.stop != width):
        raise ValueError(
            f"inputs [{columns.start}, {columns.stop}) cut a group: give multiples of {unit}, or the end, {width}"
        )
