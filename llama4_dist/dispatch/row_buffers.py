"""Preallocated memory for rows on their way out, and the one pass that fills it. Knows neither hosts nor links."""

import torch
from torch import Tensor

from llama4_dist.dispatch.layout import Indices

BLOCK_BYTES = 256 * 1024  # a block is gathered and scaled while it is in the cache: memory is passed over once


class RowBuffers:
    """Buffers for laid-out rows, reused. `pinned` makes them page-locked, for rows that leave a GPU by a socket."""

    def __init__(self, *, width: int, dtype: torch.dtype, device: torch.device, pinned: bool = False) -> None:
        self._width = width
        self._dtype = dtype
        self._device = device
        self._pinned = pinned
        self._free: list[Tensor] = []

    def take(self, num_rows: int) -> Tensor:
        """Return a buffer [capacity, D] with room for `num_rows`; its capacity is a power of two."""
        for index in range(len(self._free) - 1, -1, -1):
            if self._free[index].shape[0] >= num_rows:
                return self._free.pop(index)
        self._free.clear()  # they are smaller than what is needed now: let them go
        capacity = max(64, 1 << (num_rows - 1).bit_length())
        size = (capacity, self._width)
        return torch.empty(size, dtype=self._dtype, device=self._device, pin_memory=self._pinned)

    def give_back(self, buffer_RD: Tensor) -> None:
        self._free.append(buffer_RD)


def gather_scaled(x_TD: Tensor, scores_TK: Tensor, order_N: Indices, out_ND: Tensor) -> None:
    """Write score x input of the copies in the order `order_N`; a copy n is slot n % K of token n // K."""
    if out_ND.device != x_TD.device:  # a GPU's rows on their way to a socket: one copy across, already in order
        on_device_ND = torch.empty_like(out_ND, device=x_TD.device)
        gather_scaled(x_TD, scores_TK, order_N, on_device_ND)
        out_ND.copy_(on_device_ND)
        return
    num_slots = scores_TK.shape[1]
    if len(order_N) == 1:
        torch.mul(x_TD, scores_TK, out=out_ND)
        return
    copies_N = torch.from_numpy(order_N).to(x_TD.device)
    tokens_N = copies_N if num_slots == 1 else torch.from_numpy(order_N // num_slots).to(x_TD.device)
    scores_N1 = scores_TK.reshape(-1, 1).index_select(0, copies_N)
    num_rows = len(order_N)
    block = max(1, BLOCK_BYTES // (x_TD.shape[1] * x_TD.element_size())) if x_TD.device.type == "cpu" else num_rows
    if num_rows <= block:
        torch.index_select(x_TD, 0, tokens_N, out=out_ND)
        out_ND.mul_(scores_N1)
        return
    for start in range(0, num_rows, block):
        part_ND = out_ND[start : start + block]
        torch.index_select(x_TD, 0, tokens_N[start : start + block], out=part_ND)
        part_ND.mul_(scores_N1[start : start + block])
