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

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
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

    def bytes_of(self, entry: TensorEntry, *, rows: slice = EVERYTHING, columns: slice = EVERYTHING) -> Tensor:
        """Return `entry`, a matrix, as uint8, cut to `rows` and to byte `columns`; it shares the mapping's memory."""
        byte_shape = (entry.shape[0], entry.num_bytes // entry.shape[0])
        return self._map()[entry.start : entry.stop].view(byte_shape)[rows, columns]

    def release(self, entry: TensorEntry, index: int | None = None) -> None:
        """Take the pages of `entry`, or of matrix `index` of a stack, out of this process; a view reads them again."""
        start, stop = entry.start, entry.stop
        if index is not None:
            matrix_bytes = entry.num_bytes // entry.shape[0]
            start += index * matrix_bytes
            stop = start + matrix_bytes
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        with self._lock:
            if self._mapping is not None and stop > start:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

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
