"""Multiplies rows by a weight so that a row's bits do not depend on how many rows go with it.

Libraries choose another kernel, and so another order of summation, for one row than for many. Measured on x86 with
torch 2.13: oneDNN in float32 gives the same bits for 2 rows and more, MKL for multiples of 4 (one thread), oneDNN in
bfloat16 always. So rows are filled up to a tile, which costs nothing while weights stream from memory; the tile grows
with the row count because oneDNN compiles a kernel for every new count (0.3 to 3 ms each). CUDA's libraries promise no
such thing. Background: "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab 2025.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_TILE = 4
# In float32 oneDNN takes 264 us where MKL takes 367 (4 rows) and 793 where MKL takes 1591 (64 rows) on a [1024, 1024]
# weight read from memory; torch itself asks oneDNN for bfloat16 only.
_ONEDNN_LINEAR = torch.ops.mkldnn._linear_pointwise if torch._C._has_mkldnn else None
_ROWS_PACKED_FOR = 16  # a hint to oneDNN; other row counts give the same bits


def linear(x_TD: Tensor, weight_FD: Tensor, *, row_tile: int = ROW_TILE) -> Tensor:
    """Return x_TD @ weight_FDᵀ as [T, F]. `row_tile` 1 switches the filling off."""
    num_rows = x_TD.shape[0]
    num_padding = padded_rows(num_rows, row_tile) - num_rows
    if num_padding:
        x_TD = F.pad(x_TD, (0, 0, 0, num_padding))
    is_float32_on_cpu = x_TD.dtype == torch.float32 and x_TD.device.type == "cpu"
    if _ONEDNN_LINEAR is not None and (weight_FD.is_mkldnn or is_float32_on_cpu):
        y_TF: Tensor = _ONEDNN_LINEAR(x_TD, weight_FD, None, "none", [], "")
    else:
        y_TF = F.linear(x_TD, weight_FD)
    return y_TF[:num_rows]


def pack(weight_FD: Tensor) -> Tensor:
    """Copy a weight into the layout in which `linear` streams it fastest; only `linear` can read the result.

    oneDNN otherwise makes this copy in every call: on a [1024, 1024] weight and 16 rows 268 us instead of 342 in
    float32, 132 instead of 190 in bfloat16. Returns the weight itself where there is no such layout.
    """
    if _ONEDNN_LINEAR is None or weight_FD.device.type != "cpu":
        return weight_FD
    is_bfloat16 = weight_FD.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight_FD.dtype != torch.float32 and not is_bfloat16:
        return weight_FD
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_FD, _ROWS_PACKED_FOR)
    return packed


def padded_rows(num_rows: int, row_tile: int = ROW_TILE) -> int:
    """Round up to a multiple of the tile; past 32 rows the tile is a sixteenth of the next power of two."""
    if row_tile == 1:
        return num_rows
    tile = max(row_tile, 1 << max(0, (num_rows - 1).bit_length() - 4))
    return -(-num_rows // tile) * tile
