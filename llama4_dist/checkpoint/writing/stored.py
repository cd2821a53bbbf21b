"""A matrix that lies in another checkpoint's file: read, or copied by the kernel, without its holes."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from llama4_dist.checkpoint.blocks import Block
from llama4_dist.checkpoint.directory import open_file, read_exactly
from llama4_dist.checkpoint.fault import fault
from llama4_dist.checkpoint.header import ITEM_BYTES, TensorEntry
from llama4_dist.checkpoint.index import ShardIdentity
from llama4_dist.checkpoint.writing.moves import UNSIGNED, Bits, write_all

_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
_COPY_BYTES = 8 * 1024 * 1024
_LONG_ROW_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """`block` of the tensor `entry`; the file must still be the one whose header was checked."""

    directory: Path
    entry: TensorEntry
    identity: ShardIdentity
    block: Block

    @property
    def num_rows(self) -> int:
        return self.block.num_rows

    @property
    def row_length(self) -> int:
        return self.block.row_length

    @property
    def row_quantum(self) -> int:
        return 1

    def read(self, first: int, last: int) -> Bits | None:
        """Return rows [first, last); None where the file has nothing but a hole under them."""
        item_bytes = ITEM_BYTES[self.entry.dtype]
        begin, end = self._span(first, last)
        with self._open() as file:
            if next(data_runs(file.fileno(), begin, end), None) is None:
                return None
            if not self.block.is_contiguous and self.block.row_length * item_bytes >= _LONG_ROW_BYTES:
                return self._read_rows(file, first, last)
            file.seek(begin)
            raw = np.frombuffer(read_exactly(file, end - begin, self.entry.file), dtype=UNSIGNED[item_bytes])
        shape = (last - first, self.block.row_length)
        return as_strided(raw, shape, (self.block.stride * item_bytes, item_bytes), writeable=False)

    def _read_rows(self, file: BinaryIO, first: int, last: int) -> Bits:
        """Read row by row: what lies between long rows is not worth reading."""
        row_bytes = self.block.row_length * ITEM_BYTES[self.entry.dtype]
        rows = []
        for row in range(first, last):
            file.seek(self._span(row, row + 1)[0])
            rows.append(read_exactly(file, row_bytes, self.entry.file))
        dtype = UNSIGNED[ITEM_BYTES[self.entry.dtype]]
        return np.frombuffer(b"".join(rows), dtype=dtype).reshape(last - first, self.block.row_length)

    def copy_to(self, descriptor: int, offset: int, first: int, last: int) -> bool:
        """Copy the data runs of rows [first, last) to `offset`; False unless they lie in one run."""
        if not self.block.is_contiguous:
            return False
        begin, end = self._span(first, last)
        with self._open() as file:
            for start, stop in data_runs(file.fileno(), begin, end):
                _copy(file.fileno(), start, stop, descriptor, offset + start - begin, self.entry.file)
        return True

    def _span(self, first: int, last: int) -> tuple[int, int]:
        item_bytes, rows = ITEM_BYTES[self.entry.dtype], self.block.rows(first, last)
        return self.entry.start + rows.start * item_bytes, self.entry.start + rows.stop * item_bytes

    def _open(self) -> BinaryIO:
        file = open_file(self.directory, self.entry.file)
        if ShardIdentity.of(file.fileno()) != self.identity:
            file.close()
            raise fault(self.entry.file, "changed after the checkpoint was opened: start again")
        return file


def data_runs(descriptor: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of bytes [begin, end) that the file system stores; where it cannot tell, all of them."""
    position = begin
    while position < end:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return
            start = position
        if start >= end:
            return
        position = min(end, _hole_after(descriptor, start, end))
        yield start, position


def _hole_after(descriptor: int, start: int, end: int) -> int:
    try:
        return os.lseek(descriptor, start, os.SEEK_HOLE)
    except OSError:
        return end


def _copy(source: int, start: int, stop: int, target: int, offset: int, name: str) -> None:
    """Let the kernel copy (some file systems share the blocks), or copy through a bounded buffer where it cannot."""
    while start < stop:
        try:
            copied = os.copy_file_range(source, target, stop - start, start, offset)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            raw = os.pread(source, min(_COPY_BYTES, stop - start), start)
            write_all(target, memoryview(raw), offset)
            copied = len(raw)
        if not copied:
            raise fault(name, f"ends {stop - start} bytes early: it was cut while it was copied")
        start, offset = start + copied, offset + copied
