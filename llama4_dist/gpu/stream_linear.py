"""Multiplies few rows with weights that stream from memory once: decode. At one row, time is bytes over bandwidth.

A program owns some columns of one expert, for all its rows and the whole of K: nothing is split along K and nothing is
added atomically. The weight tile is the left operand, so that few rows fill a matrix instruction. Products are added
in the order in which `grouped_gemm` adds them; `tools/gpu_check.py` compares the two bit by bit.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_dist.gpu.grouped_gemm import IMPRECISE_PRODUCTS, grouped_gemm_reference
from llama4_dist.gpu.tile_loads import add_product, load_tile, matrix_at, silu_times
from llama4_dist.gpu.tiles import Tile, matrix_source, precision_of

MIN_ROWS = 16  # of a matrix instruction's side
MAX_ROWS = 64  # past this, `grouped_gemm` is the faster one
STREAM_TILE = Tile(block_m=MIN_ROWS, block_n=64, block_k=128, num_warps=4, num_stages=4)
PAIR_TILE = replace(STREAM_TILE, block_k=64, num_stages=6)  # where some multiprocessors get a second program
CROWD_TILE = replace(STREAM_TILE, num_stages=3)  # where all get several
MULTIPROCESSORS = 132  # of a Hopper card; a wrong number costs time, no more
FLOAT32_TILE = Tile(block_m=MIN_ROWS, block_n=64, block_k=32, num_warps=4, num_stages=2)  # for tests


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowGroups:
    """Which rows go through which expert, all on the device: `order_R[starts[g] : starts[g + 1]]` through `experts[g]`.

    A group without rows is skipped, and reads no weight.
    """

    num_groups: int
    max_rows: int  # no group has more
    starts: Tensor  # int32 [num_groups + 1]
    experts: Tensor  # int32 [num_groups]
    order_R: Tensor | None  # int32; None: row r stands at r

    @classmethod
    def dense(cls, num_rows: int, device: torch.device) -> "RowGroups":
        """All rows through weight 0."""
        starts = torch.tensor([0, num_rows], dtype=torch.int32, device=device)
        experts = torch.zeros(1, dtype=torch.int32, device=device)
        return cls(num_groups=1, max_rows=num_rows, starts=starts, experts=experts, order_R=None)


def stream_linear(
    x_RD: Tensor,
    weights_EFD: Tensor,
    groups: RowGroups,
    *,
    gated: bool = False,
    x_scale_R: Tensor | None = None,
    scales_EF: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return row r of x_RD times its group's weightᵀ in row r of [R, F]; at most MAX_ROWS rows a group.

    `gated`, `x_scale_R` and `scales_EF` as in `grouped_gemm`. Rows of no group are not written.
    """
    num_experts, num_weight_rows, width = weights_EFD.shape
    num_columns = num_weight_rows // 2 if gated else num_weight_rows
    tile = tile or default_tile(x_RD, gated, num_columns * groups.num_groups)
    assert groups.max_rows <= MAX_ROWS, "too many rows to stream weights for"
    out_RF = x_RD.new_empty((x_RD.shape[0], num_columns), dtype=out_dtype or x_RD.dtype)
    weight_source = matrix_source(weights_EFD.flatten(0, 1), tile.block_n, tile.block_k, tile.use_descriptors)
    stream_kernel[(triton.cdiv(num_columns, tile.block_n), groups.num_groups)](
        x_RD,
        weight_source,
        out_RF,
        groups.starts,
        groups.experts,
        groups.order_R,
        x_scale_R,
        scales_EF,
        num_columns,
        width,
        num_experts,
        GATED=gated,
        DESCRIBED=not isinstance(weight_source, Tensor),
        BLOCK_N=tile.block_n,
        BLOCK_T=max(MIN_ROWS, triton.next_power_of_2(groups.max_rows)),
        BLOCK_K=tile.block_k,
        PRECISION=precision_of(x_RD.dtype),
        IMPRECISE=IMPRECISE_PRODUCTS if x_RD.element_size() == 1 else 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_RF


def default_tile(x_RD: Tensor, gated: bool, num_columns: int) -> Tile:
    """Return the tile for rows of this type and so many columns of all groups together."""
    if x_RD.dtype == torch.float32:
        return FLOAT32_TILE
    num_programs = num_columns // STREAM_TILE.block_n
    if gated or num_programs > 2 * MULTIPROCESSORS:
        tile = CROWD_TILE
    else:
        tile = PAIR_TILE if num_programs > MULTIPROCESSORS else STREAM_TILE
    return replace(tile, block_k=2 * tile.block_k) if x_RD.element_size() == 1 else tile


def stream_linear_reference(x_RD: Tensor, weights_EFD: Tensor, groups: RowGroups, *, gated: bool = False) -> Tensor:
    """The same in float64, group by group; rows of no group are 0."""
    out_RF = x_RD.new_zeros((x_RD.shape[0], weights_EFD.shape[1] // (1 + gated)), dtype=torch.float64)
    order = range(len(x_RD)) if groups.order_R is None else groups.order_R.tolist()
    starts = groups.starts.tolist()
    for group, expert in enumerate(groups.experts.tolist()):
        rows = [order[i] for i in range(starts[group], starts[group + 1])]
        if rows:
            ends = torch.tensor([0, len(rows)])
            out_RF[rows] = grouped_gemm_reference(x_RD[rows], weights_EFD[expert : expert + 1], ends, gated=gated)
    return out_RF


@triton.jit
def stream_kernel(
    x,
    weights,
    out,
    starts,
    experts,
    order,
    x_scales,
    weight_scales,
    num_columns,
    width,
    num_experts,
    GATED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr,
    ADDRESSED: tl.constexpr = False,  # `weights` holds an address for each expert
):
    group = tl.program_id(1)
    start = tl.load(starts + group)
    stop = tl.load(starts + group + 1)
    if start < stop:
        expert = tl.load(experts + group)
        rows = start + tl.arange(0, BLOCK_T)
        is_row = rows < stop
        if order is not None:
            rows = tl.load(order + rows, mask=is_row, other=0)
        column = tl.program_id(0) * BLOCK_N
        weight_rows = 2 * num_columns if GATED else num_columns
        weight_row = expert * weight_rows + column
        total_rows = num_experts * weight_rows
        if ADDRESSED:
            matrix = matrix_at(weights, expert, out.dtype.element_ty)
            weight_row = column
            total_rows = weight_rows
        else:
            matrix = weights
        inner = tl.arange(0, BLOCK_K)

        first = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        second = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            w_tile = load_tile(matrix, weight_row, k, total_rows, width, BLOCK_N, BLOCK_K, DESCRIBED)
            is_inside = is_row[:, None] & (k + inner < width)[None, :]
            x_tile = tl.load(x + rows[:, None] * width + (k + inner)[None, :], mask=is_inside, other=0.0)
            first = add_product(w_tile, x_tile.T, first, PRECISION, IMPRECISE)
            if GATED:
                up_row = weight_row + num_columns
                w_tile = load_tile(matrix, up_row, k, total_rows, width, BLOCK_N, BLOCK_K, DESCRIBED)
                second = add_product(w_tile, x_tile.T, second, PRECISION, IMPRECISE)

        columns = column + tl.arange(0, BLOCK_N)
        is_column = columns < num_columns
        if x_scales is not None:
            x_scale = tl.load(x_scales + rows, mask=is_row, other=0.0)[None, :]
            scale_at = weight_scales + expert * weight_rows + columns
            first = first * (x_scale * tl.load(scale_at, mask=is_column, other=0.0)[:, None])
            if GATED:
                second = second * (x_scale * tl.load(scale_at + num_columns, mask=is_column, other=0.0)[:, None])
        if GATED:
            first = silu_times(first, second)
        at = out + rows[None, :] * num_columns + columns[:, None]
        tl.store(at, first.to(out.dtype.element_ty), mask=is_column[:, None] & is_row[None, :])
