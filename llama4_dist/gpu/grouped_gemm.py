"""Multiplies rows, sorted by expert, with the weights of the experts that received any; many rows, tensor cores.

One launch covers all experts, whatever their row counts: each program finds its expert and tile from the row starts on
the device, so nothing waits for the host. A dense linear is the case of one expert. With `gated` the two halves of a
weight are multiplied in the same tile and silu(gate) · up is written, never gate and up themselves.
Sources: tile order and grouping as in Triton's tutorials 03 and 08; gated units, Shazeer 2020 (arXiv 2002.05202).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llama4_dist.gpu.tile_loads import add_product, load_tile, matrix_at, silu_times
from llama4_dist.gpu.tiles import Tile, matrix_source, num_multiprocessors, precision_of

ROW_TILES_TOGETHER = 8  # row tiles that take one weight tile after another while it is in the L2 cache
GATED_TILE = Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4)
PLAIN_TILE = Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4)
FLOAT32_TILE = Tile(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2)  # no matrix units: for tests
FLOAT8_GATED_TILE = Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3)
FLOAT8_PLAIN_TILE = Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=4)
IMPRECISE_PRODUCTS = 128  # float8: products the tensor cores add in their own short accumulator before float32


def grouped_gemm(
    x_RD: Tensor,
    weights_EFD: Tensor,
    starts_E: Tensor,
    *,
    gated: bool = False,
    order_R: Tensor | None = None,
    x_scale_R: Tensor | None = None,
    scales_EF: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return x_RD[starts[e] : starts[e+1]] @ weights[e]ᵀ for every expert e, as [R, F]; gated: [R, F/2].

    `starts_E` is int32 with E + 1 entries. `order_R` says in which row of the result row r is written. `x_scale_R` and
    `scales_EF` are the float32 scales of float8 rows and weights. Rows past the last start are not written.
    """
    tile = tile or default_tile(x_RD, gated)
    num_experts, num_weight_rows, width = weights_EFD.shape
    num_columns = num_weight_rows // 2 if gated else num_weight_rows
    out_RF = x_RD.new_empty((x_RD.shape[0], num_columns), dtype=out_dtype or x_RD.dtype)
    x_source = matrix_source(x_RD, tile.block_m, tile.block_k, tile.use_descriptors)
    weight_source = matrix_source(weights_EFD.flatten(0, 1), tile.block_n, tile.block_k, tile.use_descriptors)
    num_tiles = (triton.cdiv(x_RD.shape[0], tile.block_m) + num_experts) * triton.cdiv(num_columns, tile.block_n)
    num_programs = num_tiles
    if tile.programs_per_sm:
        num_programs = min(num_tiles, tile.programs_per_sm * num_multiprocessors(x_RD.device))
    grouped_gemm_kernel[(num_programs,)](
        x_source,
        weight_source,
        out_RF,
        starts_E,
        order_R,
        x_scale_R,
        scales_EF,
        x_RD.shape[0],
        num_columns,
        width,
        num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        GATED=gated,
        X_DESCRIBED=not isinstance(x_source, Tensor),
        WEIGHT_DESCRIBED=not isinstance(weight_source, Tensor),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        TOGETHER=ROW_TILES_TOGETHER,
        FLAT=tile.is_flat,
        PRECISION=precision_of(x_RD.dtype),
        IMPRECISE=IMPRECISE_PRODUCTS if x_RD.element_size() == 1 else 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_RF


def default_tile(x_RD: Tensor, gated: bool) -> Tile:
    """Return the tile for rows of this type."""
    if x_RD.dtype == torch.float32:
        return FLOAT32_TILE
    if x_RD.element_size() == 1:
        return FLOAT8_GATED_TILE if gated else FLOAT8_PLAIN_TILE
    return GATED_TILE if gated else PLAIN_TILE


def grouped_gemm_reference(
    x_RD: Tensor, weights_EFD: Tensor, starts_E: Tensor, *, gated: bool = False, order_R: Tensor | None = None
) -> Tensor:
    """The same, expert by expert in float64. Float8 rows and weights are passed already multiplied by their scales."""
    parts = []
    starts = starts_E.tolist()
    for expert, (start, stop) in enumerate(pairwise(starts)):
        y_RF = x_RD[start:stop].double() @ weights_EFD[expert].double().T
        if gated:
            gate_RF, up_RF = y_RF.chunk(2, dim=-1)
            y_RF = F.silu(gate_RF) * up_RF
        parts.append(y_RF)
    out_RF = torch.cat(parts)
    return out_RF if order_R is None else torch.empty_like(out_RF).index_copy_(0, order_R.long(), out_RF)


@triton.jit
def grouped_gemm_kernel(
    x,
    weights,
    out,
    starts,
    order,
    x_scales,
    weight_scales,
    num_rows,
    num_columns,
    width,
    num_experts,
    EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    X_DESCRIBED: tl.constexpr,
    WEIGHT_DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr,
    ADDRESSED: tl.constexpr = False,  # `weights` holds an address for each expert
):
    experts = tl.arange(0, EXPERTS)
    begins = tl.load(starts + experts, mask=experts < num_experts, other=0)
    ends = tl.load(starts + experts + 1, mask=experts < num_experts, other=0)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    tiles = tl.cdiv(ends - begins, BLOCK_M) * column_tiles
    last_tiles = tl.cumsum(tiles, 0)
    weight_rows = 2 * num_columns if GATED else num_columns
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0), flatten=FLAT):
        expert = tl.sum((last_tiles <= tile).to(tl.int32), 0)
        is_mine = experts == expert
        begin = tl.sum(tl.where(is_mine, begins, 0), 0)
        end = tl.sum(tl.where(is_mine, ends, 0), 0)
        local = tile - tl.sum(tl.where(experts < expert, tiles, 0), 0)
        # Bands of row tiles: all of a band use a weight tile before the next weight tile is fetched.
        row_tiles = tl.cdiv(end - begin, BLOCK_M)
        band = local // (TOGETHER * column_tiles)
        in_band = min(row_tiles - band * TOGETHER, TOGETHER)
        within = local % (TOGETHER * column_tiles)
        row = begin + (band * TOGETHER + within % in_band) * BLOCK_M
        column = within // in_band * BLOCK_N
        weight_row = expert * weight_rows + column
        total_rows = num_experts * weight_rows
        if ADDRESSED:
            matrix = matrix_at(weights, expert, out.dtype.element_ty)
            weight_row = column
            total_rows = weight_rows
        else:
            matrix = weights

        first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            x_tile = load_tile(x, row, k, num_rows, width, BLOCK_M, BLOCK_K, X_DESCRIBED)
            w_tile = load_tile(matrix, weight_row, k, total_rows, width, BLOCK_N, BLOCK_K, WEIGHT_DESCRIBED)
            first = add_product(x_tile, w_tile.T, first, PRECISION, IMPRECISE)
            if GATED:
                up_row = weight_row + num_columns
                w_tile = load_tile(matrix, up_row, k, total_rows, width, BLOCK_N, BLOCK_K, WEIGHT_DESCRIBED)
                second = add_product(x_tile, w_tile.T, second, PRECISION, IMPRECISE)

        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        is_row = rows < end
        is_column = columns < num_columns
        if x_scales is not None:
            x_scale = tl.load(x_scales + rows, mask=is_row, other=0.0)[:, None]
            scale_at = weight_scales + expert * weight_rows + columns
            first = first * (x_scale * tl.load(scale_at, mask=is_column, other=0.0)[None, :])
            if GATED:
                second = second * (x_scale * tl.load(scale_at + num_columns, mask=is_column, other=0.0)[None, :])
        if GATED:
            first = silu_times(first, second)
        if order is not None:
            rows = tl.load(order + rows, mask=is_row, other=0)
        at = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        tl.store(at, first.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
