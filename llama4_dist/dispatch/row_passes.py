"""Brings rows in the order of their hosts and back. Knows neither hosts nor links.

On a CPU each way is one native pass over the rows. Torch does the same in three or four, for rows on a GPU and where
there is no compiler.
"""

import ctypes
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from llama4_dist.dispatch.layout import Indices
from llama4_dist.native.library import library

_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_INDEX_BYTES = 8


class RowPasses(Protocol):
    """The two ways; `order_N[i]` is the copy that stands at position i, `positions` the range to bring there."""

    def scale_in_order(
        self, x_TD: Tensor, scores_TK: Tensor, order_N: Indices, positions: slice, out_ND: Tensor
    ) -> None:
        """Write score x input of each copy to its position of `out_ND`; copy n is slot n % K of token n // K."""

    def put_if_finite(self, rows_RD: Tensor, order_N: Indices, positions: slice, out_ND: Tensor) -> bool:
        """Write each row to its copy's place in `out_ND`; return whether all values are finite, else they are void."""


def row_passes(dtype: torch.dtype, device: torch.device) -> RowPasses:
    """Return the fastest passes for rows of `dtype`, all of them on `device`."""
    native = _library() if device.type == "cpu" and dtype in _NATIVE_DTYPES else None
    return TorchRowPasses() if native is None else NativeRowPasses(native, dtype)


class NativeRowPasses:
    """Passes over rows of one dtype in memory of the CPU."""

    def __init__(self, native: ctypes.PyDLL, dtype: torch.dtype) -> None:
        name = _NATIVE_DTYPES[dtype]
        self._scale: Any = native[f"l4d_scale_in_order_{name}"]
        self._scale.argtypes = (_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER)
        self._scale.restype = None
        self._put: Any = native[f"l4d_put_if_finite_{name}"]
        self._put.argtypes = (_POINTER, _POINTER, _SIZE, _SIZE, _POINTER)
        self._put.restype = ctypes.c_int
        self._itemsize = dtype.itemsize

    def scale_in_order(
        self, x_TD: Tensor, scores_TK: Tensor, order_N: Indices, positions: slice, out_ND: Tensor
    ) -> None:
        if not (x_TD.is_contiguous() and scores_TK.is_contiguous()):
            x_TD, scores_TK = x_TD.contiguous(), scores_TK.contiguous()
        start, width = positions.start, x_TD.shape[1]
        self._scale(
            x_TD.data_ptr(),
            width,
            scores_TK.data_ptr(),
            scores_TK.shape[1],
            _address(order_N) + start * _INDEX_BYTES,
            positions.stop - start,
            width,
            out_ND.data_ptr() + start * width * self._itemsize,
        )

    def put_if_finite(self, rows_RD: Tensor, order_N: Indices, positions: slice, out_ND: Tensor) -> bool:
        num_rows, width = positions.stop - positions.start, out_ND.shape[1]
        assert rows_RD.shape == (num_rows, width), "a reply of another size"
        assert rows_RD.dtype == out_ND.dtype, "a reply of another dtype"
        if not rows_RD.is_contiguous():
            rows_RD = rows_RD.contiguous()
        targets = _address(order_N) + positions.start * _INDEX_BYTES
        return bool(self._put(rows_RD.data_ptr(), targets, num_rows, width, out_ND.data_ptr()))


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


@cache
def _library() -> ctypes.PyDLL | None:
    """Load the native passes. A call keeps other Python threads waiting, for it is shorter than handing them a turn."""
    path = library()
    return None if path is None else ctypes.PyDLL(str(path))


def _address(indices: Indices) -> int:
    """Return where the indices lie; `ndarray.ctypes` takes four times as long."""
    if not indices.size:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(indices))  # type: ignore[arg-type]  # an array is a buffer
