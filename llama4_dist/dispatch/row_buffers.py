"""Preallocated memory for rows, and the passes that fill it and that empty it. Knows neither hosts nor links."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.dispatch.layout import Indices

BLOCK_BYTES = 256 * 1024  # a block is gathered and scaled while it is in the cache: memory is passed over once
_MAX_VIEWS = 64


class RowBuffer:
    """Memory for up to `capacity` rows. Memory that is never used is never touched, and costs nothing."""

    def __init__(
        self, capacity: int, width: int, dtype: torch.dtype, device: torch.device, pinned: bool = False
    ) -> None:
        self.capacity = capacity
        self._all_RD = torch.empty((capacity, width), dtype=dtype, device=device, pin_memory=pinned)
        self._views: dict[int, Tensor] = {}

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


def gather_scaled(x_TD: Tensor, scores_TK: Tensor, order_N: Indices, out_ND: Tensor) -> None:
    """Write score x input of the copies `order_N`, in that order; a copy n is slot n % K of token n // K."""
    if out_ND.device != x_TD.device:  # a GPU's rows on their way to a socket: one copy across, already in order
        on_device_ND = torch.empty_like(out_ND, device=x_TD.device)
        gather_scaled(x_TD, scores_TK, order_N, on_device_ND)
        out_ND.copy_(on_device_ND)
        return
    num_tokens, num_slots = scores_TK.shape
    if num_tokens * num_slots == 1:
        torch.mul(x_TD, scores_TK, out=out_ND)
        return
    on_cpu = x_TD.is_cpu
    copies_N = torch.from_numpy(order_N)
    tokens_N = copies_N if num_slots == 1 else torch.from_numpy(order_N // num_slots)
    if not on_cpu:
        copies_N, tokens_N = copies_N.to(x_TD.device), tokens_N.to(x_TD.device)
    scores_N1 = scores_TK.reshape(-1, 1).index_select(0, copies_N)
    num_rows = len(order_N)
    block = max(1, BLOCK_BYTES // (x_TD.shape[1] * x_TD.itemsize)) if on_cpu else num_rows
    if num_rows <= block:
        torch.index_select(x_TD, 0, tokens_N, out=out_ND)
        out_ND.mul_(scores_N1)
        return
    for start in range(0, num_rows, block):
        part_ND = out_ND[start : start + block]
        torch.index_select(x_TD, 0, tokens_N[start : start + block], out=part_ND)
        part_ND.mul_(scores_N1[start : start + block])


def put_rows(out_ND: Tensor, targets_R: Indices, rows_RD: Tensor) -> None:
    """Write row i of `rows_RD` to row `targets_R[i]`, bit for bit.

    On a CPU, rows go as opaque records through NumPy: torch's indexed copy takes four times as long.
    """
    if out_ND.is_cpu and rows_RD.is_cpu and rows_RD.is_contiguous():
        _records(out_ND)[targets_R] = _records(rows_RD)
    else:
        out_ND[torch.from_numpy(targets_R).to(out_ND.device)] = rows_RD.to(out_ND.device)


def _records(rows_RD: Tensor) -> NDArray[np.void]:
    """View contiguous rows as one record each. NumPy has no bfloat16: its bits are taken as int16."""
    rows = rows_RD.view(torch.int16) if rows_RD.dtype == torch.bfloat16 else rows_RD
    return rows.numpy().view(f"V{rows_RD.shape[1] * rows_RD.itemsize}")[:, 0]
