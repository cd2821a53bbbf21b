"""Measures what this machine can do at most: bytes read from memory a second, float32 operations a second.

The read is a C++ loop over a buffer far larger than the last cache, compiled here; torch's own sum over the same buffer
stands beside it. The product is of square matrices, by MKL and by oneDNN; the best counts.
"""

import ctypes
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

BUFFER_BYTES = 3 << 29  # 1.6 GB
SIZES = (2048, 3072, 4096)  # of the matrices
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class Memory:
    """A buffer of `num_bytes`, touched once, and two ways to read it."""

    def __init__(self, folder: Path, num_threads: int, num_bytes: int = BUFFER_BYTES) -> None:
        library = folder / "machine.so"
        source = Path(__file__).with_name("machine.cpp")
        subprocess.run(["g++", *FLAGS, str(source), "-o", str(library)], check=True)
        self._read_all = ctypes.CDLL(str(library)).read_all
        self._read_all.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self._read_all.restype = ctypes.c_uint64
        self._num_threads = num_threads
        # 64 bytes more than needed, so that a line of the cache can begin at the first.
        self._buffer = torch.ones(num_bytes // 4 + 16, dtype=torch.float32)
        self._first = -self._buffer.data_ptr() % 64 // 4
        self._num_bytes = num_bytes

    def native(self) -> float:
        """Return bytes per second of the C++ loop."""
        started = time.perf_counter()
        self._read_all(self._buffer.data_ptr() + 4 * self._first, self._num_bytes, self._num_threads)
        return self._num_bytes / (time.perf_counter() - started)

    def torch(self) -> float:
        """Return bytes per second of `torch.sum` over the same bytes."""
        view = self._buffer[self._first : self._first + self._num_bytes // 4]
        started = time.perf_counter()
        view.sum()
        return self._num_bytes / (time.perf_counter() - started)


class Products:
    """Square float32 products by each library there is."""

    def __init__(self) -> None:
        self._matrices = {size: torch.randn(size, size) for size in SIZES}
        self._libraries: dict[str, Callable[[Tensor], Tensor]] = {"torch.mm": lambda matrix: matrix @ matrix}
        if torch._C._has_mkldnn:
            onednn = torch.ops.mkldnn._linear_pointwise
            self._libraries["oneDNN"] = lambda matrix: onednn(matrix, matrix, None, "none", [], "")

    def rates(self) -> dict[str, float]:
        """Return operations per second by library and size."""
        rates = {}
        for name, multiply in self._libraries.items():
            for size, matrix in self._matrices.items():
                started = time.perf_counter()
                multiply(matrix)
                rates[f"{name} {size}"] = 2 * size**3 / (time.perf_counter() - started)
        return rates
