"""Multiplies rows with matrices that lie apart, each at its address: experts that come and go one by one.

The kernels are those of `stream_linear` and `grouped_gemm`, so a row has the bits that stacked weights give it. Weights
are loaded through pointers: a tensor map describes one allocation.
"""

from dataclasses import dataclass

import triton
from torch import Tensor

from llama4_dist.gpu.grouped_gemm import ROW_TILES_TOGETHER, grouped_gemm_kernel
from llama4_dist.gpu.grouped_gemm import default_tile as tile_of_many
from llama4_dist.gpu.stream_linear import MAX_ROWS, MIN_ROWS, stream_kernel
from llama4_dist.gpu.stream_linear import default_tile as tile_of_few
from llama4_dist.gpu.tiles import matrix_source, precision_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AddressedGroups:
    """Rows of `num_groups` experts, one after the other: group g is rows starts[g] to starts[g + 1].

    Its weights [F, D], dense, are at the addresses gate_up[g] and down[g], multiples of 16. Groups may be empty.
    """

    num_groups: int
    max_rows: int  # no group has more
    starts: Tensor  # int32 [num_groups + 1]
    numbers: Tensor  # int32 [num_groups]: 0, 1, …
    gate_up: Tensor  # int64 [num_groups]
    down: Tensor  # int64 [num_groups]


def multiply_addressed(
    x_RD: Tensor, addresses: Tensor, groups: AddressedGroups, *, num_columns: int, gated: bool = False
) -> Tensor:
    """Return each row of x_RD times its group's weightᵀ, [R, num_columns]; rows of no group are not written.

    `gated` as in `grouped_gemm`: the weights have 2 · num_columns rows.
    """
    out_RF = x_RD.new_empty((x_RD.shape[0], num_columns))
    launch = _stream if groups.max_rows <= MAX_ROWS else _multiply_many
    launch(x_RD, addresses, groups, out_RF, gated)
    return out_RF


def _stream(x_RD: Tensor, addresses: Tensor, groups: AddressedGroups, out_RF: Tensor, gated: bool) -> None:
    num_columns, width = out_RF.shape[1], x_RD.shape[1]
    tile = tile_of_few(x_RD, gated, num_columns * groups.num_groups)
    stream_kernel[(triton.cdiv(num_columns, tile.block_n), groups.num_groups)](
        x_RD,
        addresses,
        out_RF,
        groups.starts,
        groups.numbers,
        None,
        None,
        None,
        num_columns,
        width,
        MIN_ROWS,  # of experts: not read, and always the same, so that no number of groups is compiled for
        GATED=gated,
        DESCRIBED=False,
        BLOCK_N=tile.block_n,
        BLOCK_T=max(MIN_ROWS, triton.next_power_of_2(groups.max_rows)),
        BLOCK_K=tile.block_k,
        PRECISION=precision_of(x_RD.dtype),
        IMPRECISE=0,
        ADDRESSED=True,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _multiply_many(x_RD: Tensor, addresses: Tensor, groups: AddressedGroups, out_RF: Tensor, gated: bool) -> None:
    (num_rows, width), num_columns = x_RD.shape, out_RF.shape[1]
    tile = tile_of_many(x_RD, gated)
    x_source = matrix_source(x_RD, tile.block_m, tile.block_k, tile.use_descriptors)
    num_tiles = (triton.cdiv(num_rows, tile.block_m) + groups.num_groups) * triton.cdiv(num_columns, tile.block_n)
    grouped_gemm_kernel[(num_tiles,)](
        x_source,
        addresses,
        out_RF,
        groups.starts,
        None,
        None,
        None,
        num_rows,
        num_columns,
        width,
        groups.num_groups,
        EXPERTS=triton.next_power_of_2(groups.num_groups),
        GATED=gated,
        X_DESCRIBED=not isinstance(x_source, Tensor),
        WEIGHT_DESCRIBED=False,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        TOGETHER=ROW_TILES_TOGETHER,
        FLAT=tile.is_flat,
        PRECISION=precision_of(x_RD.dtype),
        IMPRECISE=0,
        ADDRESSED=True,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
