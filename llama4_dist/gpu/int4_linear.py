"""Multiplies rows with four-bit weights, unpacked in registers: few rows or many by one kernel.

The integers are exact in bfloat16, so a group's sum is one of exact products; its scale is applied in float32. Groups
are added in ascending order, whatever the number of rows. The unpacking by exponent bits is that of Kim et al. 2022
(arXiv 2211.10017).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_dist.gpu.quantize import GROUP
from llama4_dist.gpu.stream_linear import MIN_ROWS, RowGroups
from llama4_dist.gpu.tile_loads import add_product, silu_times
from llama4_dist.gpu.tiles import Tile, precision_of

INT4_TILE = Tile(block_m=64, block_n=64, block_k=4 * GROUP, num_warps=4, num_stages=3)
INT4_GATED_TILE = Tile(block_m=64, block_n=64, block_k=2 * GROUP, num_warps=4, num_stages=3)
# Unpacking costs the more of the time the fewer rows use an unpacked weight.
INT4_MANY_TILE = Tile(block_m=128, block_n=128, block_k=GROUP, num_warps=8, num_stages=3)
INT4_GATED_MANY_TILE = Tile(block_m=128, block_n=64, block_k=GROUP, num_warps=8, num_stages=3)


def int4_linear(
    x_RD: Tensor,
    packed: Tensor,
    scales: Tensor,
    groups: RowGroups,
    *,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return what `stream_linear` does, from weights of `to_int4` and for any number of rows."""
    if tile is None:
        few, many = (INT4_GATED_TILE, INT4_GATED_MANY_TILE) if gated else (INT4_TILE, INT4_MANY_TILE)
        tile = few if groups.max_rows <= few.block_m else many
    num_weight_rows, num_groups = scales.shape[1:]
    num_columns = num_weight_rows // 2 if gated else num_weight_rows
    out_RF = x_RD.new_empty((x_RD.shape[0], num_columns), dtype=out_dtype or x_RD.dtype)
    block_t = min(tile.block_m, max(MIN_ROWS, triton.next_power_of_2(groups.max_rows)))
    grid = (triton.cdiv(num_columns, tile.block_n), groups.num_groups, triton.cdiv(groups.max_rows, block_t))
    int4_kernel[grid](
        x_RD,
        packed,
        scales,
        out_RF,
        groups.starts,
        groups.experts,
        groups.order_R,
        num_columns,
        num_groups,
        GATED=gated,
        GROUP=GROUP,
        TOGETHER=tile.block_k // GROUP,
        BLOCK_N=tile.block_n,
        BLOCK_T=block_t,
        PRECISION=precision_of(x_RD.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_RF


@triton.jit
def unpack(bits, dtype: tl.constexpr):
    """The numbers -8 to 7 of four bits each: written into the low end of 128.0's fraction, less 136."""
    if dtype == tl.bfloat16:
        numbers = (bits.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full((), 136.0, tl.bfloat16)
    else:
        numbers = (bits.to(tl.float32) - 8.0).to(dtype)
    return numbers


@triton.jit
def add_group(packed_row, x_low, x_high, scale, total, half, is_row, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """total + scale · (weights of one group @ x), where x comes as the group's two halves, [T, GROUP / 2] each."""
    pair = tl.load(packed_row[:, None] + half[None, :], mask=is_row[:, None], other=0)
    part = tl.zeros(total.shape, dtype=tl.float32)
    part = add_product(unpack(pair & 15, dtype), x_low.T, part, PRECISION, 0)
    part = add_product(unpack(pair >> 4, dtype), x_high.T, part, PRECISION, 0)
    return total + part * scale[:, None]


@triton.jit
def int4_kernel(
    x,
    packed,
    scales,
    out,
    starts,
    experts,
    order,
    num_columns,
    num_groups,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(1)
    start = tl.load(starts + group) + tl.program_id(2) * BLOCK_T
    stop = tl.load(starts + group + 1)
    if start < stop:
        expert = tl.load(experts + group)
        rows = start + tl.arange(0, BLOCK_T)
        is_row = rows < stop
        if order is not None:
            rows = tl.load(order + rows, mask=is_row, other=0)
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = columns < num_columns
        weight_rows = expert * (2 * num_columns if GATED else num_columns) + columns
        half = tl.arange(0, GROUP // 2)
        width = num_groups * GROUP
        dtype: tl.constexpr = tl.float32 if PRECISION == "upcast" else x.dtype.element_ty
        x_rows = x + rows.to(tl.int64)[:, None] * width + half[None, :]
        packed_rows = packed + weight_rows.to(tl.int64) * (width // 2)
        scale_rows = scales + weight_rows.to(tl.int64) * num_groups
        first = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        second = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for step in range(0, num_groups, TOGETHER):
            for offset in tl.static_range(TOGETHER):
                at = step + offset
                row_exists = (is_row & (at + tl.zeros_like(rows) < num_groups))[:, None]
                column_exists = is_column & (at + tl.zeros_like(columns) < num_groups)
                x_low = tl.load(x_rows + at * GROUP, mask=row_exists, other=0.0)
                x_high = tl.load(x_rows + at * GROUP + GROUP // 2, mask=row_exists, other=0.0)
                scale = tl.load(scale_rows + at, mask=column_exists, other=0.0)
                packed_row = packed_rows + at * (GROUP // 2)
                first = add_group(packed_row, x_low, x_high, scale, first, half, column_exists, dtype, PRECISION)
                if GATED:
                    scale = tl.load(scale_rows + num_columns * num_groups + at, mask=column_exists, other=0.0)
                    packed_row += num_columns.to(tl.int64) * (width // 2)
                    second = add_group(packed_row, x_low, x_high, scale, second, half, column_exists, dtype, PRECISION)
        if GATED:
            first = silu_times(first, second)
        at_out = out + rows.to(tl.int64)[None, :] * num_columns + columns[:, None]
        tl.store(at_out, first.to(out.dtype.element_ty), mask=is_column[:, None] & is_row[None, :])
