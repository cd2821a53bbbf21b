"""Random weights by row groups: a value depends on (seed, matrix name, shape, position) alone.

Neither threads nor shards nor the layout change a number: group g of a matrix is drawn by Philox, a counter-based
generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11), keyed by seed and name and started at g.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama4_dist.checkpoint.writing.moves import Bits

GROUP_ELEMENTS = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomMatrix:
    """Normal values around `mean` with deviation `std`, stored as `dtype` (F32, BF16 or F16)."""

    name: str
    seed: int
    num_rows: int
    row_length: int
    mean: float
    std: float
    dtype: str

    @property
    def row_quantum(self) -> int:
        return max(1, GROUP_ELEMENTS // self.row_length)

    def read(self, first: int, last: int) -> Bits:
        """Return rows [first, last)."""
        quantum = self.row_quantum
        drawn = [self._group(number) for number in range(first // quantum, (last - 1) // quantum + 1)]
        offset = first // quantum * quantum
        return np.concatenate(drawn)[first - offset : last - offset]

    def copy_to(self, descriptor: int, offset: int, first: int, last: int) -> bool:
        return False  # there is no file to copy from

    def _group(self, number: int) -> Bits:
        digest = hashlib.sha256(f"{self.seed}/{self.name}".encode()).digest()
        # The third counter word is the group's: no group can draw so much that it comes to the next one's numbers.
        philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=[0, 0, number, 0])
        rows = min(self.row_quantum, self.num_rows - number * self.row_quantum)
        values = np.random.Generator(philox).standard_normal((rows, self.row_length), dtype=np.float32)
        values *= np.float32(self.std)
        if self.mean:
            values += np.float32(self.mean)
        return _as_stored(values, self.dtype)


def _as_stored(values: NDArray[np.float32], dtype: str) -> Bits:
    """Round to nearest, ties to even, and return the bits."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)  # finite: adding half of the last place cannot run into NaN
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype(np.uint16)
