"""Maps one safetensors file read-only and hands out tensors that are views of the mapping.

Nothing is read until a view is touched; the kernel then brings in the touched pages (and up to a read-ahead window
around them), shares them between processes and drops them again under memory pressure.

Hazard: a mapped file that somebody truncates afterwards kills the process with SIGBUS when a lost page is touched; no
check can prevent that. Checkpoints must be replaced by writing new files, never in place.
"""

import mmap
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from llama4_dist.checkpoint.directory import open_file
from llama4_dist.checkpoint.fault import fault
from llama4_dist.checkpoint.header import ITEM_BYTES, TensorEntry
from llama4_dist.checkpoint.index import ShardIdentity

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EVERYTHING = slice(None)


class Shard:
    """One file of the checkpoint; mapped at first use."""

    def __init__(self, directory: Path, name: str, identity: ShardIdentity) -> None:
        self._directory = directory
        self._name = name
        self._identity = identity
        self._lock = threading.Lock()
        self._bytes: Tensor | None = None
        self._mapping: mmap.mmap | None = None

    def matrix(
        self, entry: TensorEntry, index: int | None = None, *, rows: slice = EVERYTHING, columns: slice = EVERYTHING
    ) -> Tensor:
        """Return `entry`, or matrix `index` of a stack, cut to `rows` of its first and `columns` of its last axis.

        The result shares the mapping's memory, unless the file stores the tensor at an address its dtype cannot have;
        then exactly the cut is copied.
        """
        item_bytes = ITEM_BYTES[entry.dtype]
        byte_shape = (*entry.shape[:-1], entry.shape[-1] * item_bytes)
        raw = self._map()[entry.start : entry.stop].view(byte_shape)
        if index is not None:
            raw = raw[index]
        first, last, _ = columns.indices(entry.shape[-1])
        raw = raw[rows][..., first * item_bytes : last * item_bytes]
        if entry.start % item_bytes:
            raw = raw.clone(memory_format=torch.contiguous_format)
        return raw.view(TORCH_DTYPES[entry.dtype])

    def release(
        self, entry: TensorEntry, index: int | None = None, *, rows: slice = EVERYTHING, around: int = 0
    ) -> None:
        """Take the pages of `entry`, or of `rows` of matrix `index` of a stack, out of this process.

        Those of `around` bytes on either side go too: the kernel maps more than what is touched. A view reads them
        again.
        """
        start, stop = _byte_range(entry, index, rows)
        start, stop = max(0, start - around), min(self._identity.num_bytes, stop + around)
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        with self._lock:
            if self._mapping is not None and stop > start:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def read_ahead(
        self, entry: TensorEntry, index: int | None = None, *, rows: slice = EVERYTHING, columns: slice = EVERYTHING
    ) -> None:
        """Have the kernel begin to read what `matrix` would return; returns before it is there."""
        start, stop = _byte_range(entry, index, rows)
        row_bytes = entry.shape[-1] * ITEM_BYTES[entry.dtype]
        first, last, _ = columns.indices(entry.shape[-1])
        begin, length = first * ITEM_BYTES[entry.dtype], (last - first) * ITEM_BYTES[entry.dtype]
        if length == row_bytes:
            begin, length, row_bytes = 0, stop - start, stop - start
        self._map()
        with self._lock:
            for row in range(start, stop, row_bytes):
                at = (row + begin) // mmap.PAGESIZE * mmap.PAGESIZE
                if self._mapping is not None:
                    self._mapping.madvise(mmap.MADV_WILLNEED, at, row + begin + length - at)

    def close(self) -> None:
        """Let go of the mapping; it stays until the last view of it is gone."""
        with self._lock:
            self._bytes = self._mapping = None

    def _map(self) -> Tensor:
        """Return the whole file as one uint8 tensor."""
        with self._lock:
            if self._bytes is None:
                with open_file(self._directory, self._name) as file:
                    if ShardIdentity.of(file.fileno()) != self._identity:
                        raise fault(self._name, "changed after the checkpoint was opened: open it again")
                    mapping = mmap.mmap(file.fileno(), self._identity.num_bytes, access=mmap.ACCESS_READ)
                with warnings.catch_warnings():
                    # torch warns that writing over a read-only buffer is undefined; nobody writes to weights.
                    warnings.filterwarnings("ignore", message="The given buffer is not writable")
                    self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
                self._mapping = mapping
            return self._bytes


def _byte_range(entry: TensorEntry, index: int | None, rows: slice) -> tuple[int, int]:
    """Return where `rows` of a tensor, or of matrix `index` of a stack, begin and end in the file."""
    shape = entry.shape if index is None else entry.shape[1:]
    matrix_bytes = entry.num_bytes if index is None else entry.num_bytes // entry.shape[0]
    start = entry.start + (index or 0) * matrix_bytes
    first, last, _ = rows.indices(shape[0])
    row_bytes = matrix_bytes // shape[0]
    return start + first * row_bytes, start + last * row_bytes
