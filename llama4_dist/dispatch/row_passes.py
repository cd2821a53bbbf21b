"""Brings rows in the order of their hosts and back. Knows neither hosts nor links.

On a CPU each way is one native pass over the rows. Torch does the same in three or four, for rows on a GPU and where
there is no compiler.
"""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from llama4_dist.dispatch.layout import Indices
from llama4_dist.native.extension import extension

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class RowPasses(Protocol):
    """The two ways; `order_N[i]` is the copy that stands at position i, `positions` the range to bring there."""

    def scale_in_order(
        self, x_TD: Tensor, scores_TK: Tensor, order_N: Indices, positions: slice, out_ND: Tensor
    ) -> None:
        """Write score x input of each copy to its position of `out_ND`; copy n is slot n % K of token n // K."""

    def put_if_finite(self, rows_RD: Tensor, order_N: Indices, positions: slice, out_ND: Tensor) -> bool:
        """Write each row to its copy's place in `out_ND`; return whether all values are finite, else they are void."""


def row_passes(dtype: torch.dtype, device: torch.device, width: int) -> RowPasses:
    """Return the fastest passes for rows of `width` values of `dtype`, all of them on `device`."""
    native = extension() if device.type == "cpu" and dtype in _NATIVE_DTYPES else None
    return TorchRowPasses() if native is None else NativeRowPasses(native, dtype, width)


class NativeRowPasses:
    """Passes over rows of one dtype in memory of the CPU."""

    def __init__(self, native: ModuleType, dtype: torch.dtype, width: int) -> None:
        self._scale, self._put = native.scale_in_order, native.put_if_finite
        self._is_bfloat16 = dtype == torch.bfloat16
        self._width = width
        self._row_bytes = width * dtype.itemsize

    def scale_in_order(
        self, x_TD: Tensor, scores_TK: Tensor, order_N: Indices, positions: slice, out_ND: Tensor
    ) -> None:
        if not (x_TD.is_contiguous() and scores_TK.is_contiguous()):
            x_TD, scores_TK = x_TD.contiguous(), scores_TK.contiguous()
        num_copies, width = len(order_N), self._width
        num_tokens, num_slots = scores_TK.shape
        assert num_copies == num_tokens * num_slots, "an order of another number of copies"
        assert out_ND.nbytes == num_copies * self._row_bytes, "rows of another number or width"
        assert x_TD.nbytes == num_tokens * self._row_bytes, "tokens of another number or width"
        start, stop = positions.start, positions.stop
        x, scores, out = x_TD.data_ptr(), scores_TK.data_ptr(), out_ND.data_ptr()
        self._scale(self._is_bfloat16, x, width, num_tokens, scores, num_slots, order_N, start, stop, width, out)

    def put_if_finite(self, rows_RD: Tensor, order_N: Indices, positions: slice, out_ND: Tensor) -> bool:
        start, stop = positions.start, positions.stop
        assert rows_RD.nbytes == (stop - start) * self._row_bytes, "a reply of another size"
        if not rows_RD.is_contiguous():
            rows_RD = rows_RD.contiguous()
        rows, out = rows_RD.data_ptr(), out_ND.data_ptr()
        num_places = out_ND.shape[0]
        is_finite: bool = self._put(self._is_bfloat16, rows, order_N, start, stop, self._width, num_places, out)
        return is_finite


class TorchRowPasses:
    """The same for rows of any dtype on any device."""

    def scale_in_order(
        self, x_TD: Tensor, scores_TK: Tensor, order_N: Indices, positions: slice, out_ND: Tensor
    ) -> None:
        order_R = torch.from_numpy(order_N[positions]).to(x_TD.device)
        rows_RD = x_TD.index_select(0, order_R // scores_TK.shape[1])
        out_ND[positions].copy_(rows_RD * scores_TK.flatten().index_select(0, order_R)[:, None])

    def put_if_finite(self, rows_RD: Tensor, order_N: Indices, positions: slice, out_ND: Tensor) -> bool:
        if not all_finite(rows_RD):
            return False
        out_ND[torch.from_numpy(order_N[positions]).to(out_ND.device)] = rows_RD.to(out_ND.device)
        return True


def all_finite(rows_RD: Tensor) -> bool:
    """Tell whether no value is NaN or infinite."""
    return bool(torch.isfinite(rows_RD).all())
