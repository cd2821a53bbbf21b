"""Preallocated memory for rows, used again and again. Knows neither hosts nor links."""

import torch
from torch import Tensor

_MAX_VIEWS = 64


class RowBuffer:
    """Memory for up to `capacity` rows. Memory that is never used is never touched, and costs nothing."""

    def __init__(
        self, capacity: int, width: int, dtype: torch.dtype, device: torch.device, pinned: bool = False
    ) -> None:
        self.capacity = capacity
        self.row_bytes = width * dtype.itemsize
        self._all_RD = torch.empty((capacity, width), dtype=dtype, device=device, pin_memory=pinned)
        self._views: dict[int, Tensor] = {capacity: self._all_RD}

    def rows(self, num_rows: int) -> Tensor:
        """Return the first `num_rows` rows; the same view again where a number repeats, as in decode."""
        rows_RD = self._views.get(num_rows)
        if rows_RD is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            rows_RD = self._views[num_rows] = self._all_RD[:num_rows]
        return rows_RD


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
