"""The weights of one or several linears of one shape, as the kernels read them, and their product with rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_dist.gpu.grouped_gemm import grouped_gemm
from llama4_dist.gpu.routing import SortedRows
from llama4_dist.gpu.stream_linear import RowGroups, stream_linear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """Weights [E, F, D], one linear an entry, each output's row dense; a gated one holds gate's rows, then up's."""

    values_EFD: Tensor

    def multiply(
        self,
        x_RD: Tensor,
        rows: RowGroups | SortedRows,
        *,
        gated: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the product with `x_RD`: rows in any order and few, or sorted by expert and many.

        With SortedRows, gated products stay sorted; plain ones go back to the order before sorting.
        """
        if isinstance(rows, RowGroups):
            return stream_linear(x_RD, self.values_EFD, rows, gated=gated, out_dtype=out_dtype)
        order_R = None if gated else rows.order_R
        return grouped_gemm(x_RD, self.values_EFD, rows.starts, gated=gated, order_R=order_R, out_dtype=out_dtype)
