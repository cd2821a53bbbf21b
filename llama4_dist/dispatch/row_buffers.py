"""Preallocated memory for rows, and the passes that bring rows in order and back. Knows neither hosts nor links.

On a CPU, rows change places as opaque NumPy records, bit for bit: torch's indexed copy takes four times as long.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.dispatch.layout import Indices

_MAX_VIEWS = 64


class RowBuffer:
    """Memory for up to `capacity` rows. Memory that is never used is never touched, and costs nothing."""

    def __init__(
        self, capacity: int, width: int, dtype: torch.dtype, device: torch.device, pinned: bool = False
    ) -> None:
        self.capacity = capacity
        self._all_RD = torch.empty((capacity, width), dtype=dtype, device=device, pin_memory=pinned)
        record = np.dtype((np.void, width * dtype.itemsize))
        self._records = _bits(self._all_RD).view(record)[:, 0] if self._all_RD.is_cpu else None
        self._views: dict[int, Tensor] = {capacity: self._all_RD}

    def rows(self, num_rows: int) -> Tensor:
        """Return the first `num_rows` rows; the same view again where a number repeats, as in decode."""
        rows_RD = self._views.get(num_rows)
        if rows_RD is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            rows_RD = self._views[num_rows] = self._all_RD[:num_rows]
        return rows_RD

    def take(self, positions: slice, source: "RowBuffer", order_R: Indices) -> None:
        """Write row `order_R[i]` of `source` to the i-th of `positions`."""
        if self._records is not None and source._records is not None:
            source._records.take(order_R, out=self._records[positions], mode="clip")  # "raise" would copy first
        else:
            order = torch.from_numpy(order_R).to(source._all_RD.device)
            self._all_RD[positions].copy_(source._all_RD.index_select(0, order))

    def put(self, targets_R: Indices, rows_RD: Tensor) -> None:
        """Write row i of `rows_RD` to row `targets_R[i]`."""
        if self._records is not None and rows_RD.is_cpu and rows_RD.is_contiguous():
            self._records[targets_R] = _bits(rows_RD).view(self._records.dtype)[:, 0]
        else:
            device = self._all_RD.device
            self._all_RD[torch.from_numpy(targets_R).to(device)] = rows_RD.to(device)


class RowBuffers:
    """Buffers for laid-out rows, reused. `pinned` makes them page-locked, for rows that leave a GPU by a socket."""

    def __init__(self, *, width: int, dtype: torch.dtype, device: torch.device, pinned: bool = False) -> None:
        self._width = width
        self._dtype = dtype
        self._device = device
        self._pinned = pinned
        self._free: list[RowBuffer] = []

    def take(self, num_rows: int) -> RowBuffer:
        """Return a buffer with room for `num_rows`; its capacity is a power of two."""
        for index in range(len(self._free) - 1, -1, -1):
            if self._free[index].capacity >= num_rows:
                return self._free.pop(index)
        self._free.clear()  # they are smaller than what is needed now: let them go
        capacity = max(64, 1 << (num_rows - 1).bit_length())
        return RowBuffer(capacity, self._width, self._dtype, self._device, self._pinned)

    def give_back(self, buffer: RowBuffer) -> None:
        self._free.append(buffer)


def scale(x_TD: Tensor, scores_TK: Tensor, out_ND: Tensor) -> None:
    """Write score x input of every copy; copy n is slot n % K of token n // K."""
    num_tokens, num_slots = scores_TK.shape
    if num_slots == 1:
        torch.mul(x_TD, scores_TK, out=out_ND)
    else:
        torch.mul(x_TD.unsqueeze(1), scores_TK.unsqueeze(2), out=out_ND.view(num_tokens, num_slots, x_TD.shape[1]))


def _bits(rows_RD: Tensor) -> NDArray[Any]:
    """Return rows as an array of the same bits: NumPy has no bfloat16."""
    return (rows_RD.view(torch.int16) if rows_RD.dtype == torch.bfloat16 else rows_RD).numpy()
