"""The weights of one or several linears of one shape, as the kernels read them, and their product with rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_dist.gpu.grouped_gemm import grouped_gemm
from llama4_dist.gpu.int4_linear import int4_linear
from llama4_dist.gpu.quantize import FLOAT8, quantize_rows, to_float8, to_int4
from llama4_dist.gpu.routing import SortedRows
from llama4_dist.gpu.stream_linear import RowGroups, stream_linear

FORMATS = ("stored", "float8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """Weights [E, F, D], one linear an entry, each output's row dense; a gated one holds gate's rows, then up's.

    With scales [E, F] the values are float8; with scales [E, F, D/GROUP] they are two four-bit numbers a byte.
    """

    values_EFD: Tensor
    scales: Tensor | None = None

    def quantized(self, form: str) -> "Packed":
        """Return the same weights in one of FORMATS."""
        if form == "stored":
            return self
        values_EFD, scales = to_float8(self.values_EFD) if form == "float8" else to_int4(self.values_EFD)
        return Packed(values_EFD=values_EFD, scales=scales)

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
        if self.values_EFD.dtype == torch.uint8:
            return self._multiply_int4(x_RD, rows, gated, out_dtype)
        out_dtype, x_scale_R = out_dtype or x_RD.dtype, None
        if self.values_EFD.dtype == FLOAT8:
            x_RD, x_scale_R = quantize_rows(x_RD)
        if isinstance(rows, RowGroups):
            return stream_linear(
                x_RD,
                self.values_EFD,
                rows,
                gated=gated,
                x_scale_R=x_scale_R,
                scales_EF=self.scales,
                out_dtype=out_dtype,
            )
        return grouped_gemm(
            x_RD,
            self.values_EFD,
            rows.starts,
            gated=gated,
            order_R=None if gated else rows.order_R,
            x_scale_R=x_scale_R,
            scales_EF=self.scales,
            out_dtype=out_dtype,
        )

    def _multiply_int4(
        self, x_RD: Tensor, rows: RowGroups | SortedRows, gated: bool, out_dtype: torch.dtype | None
    ) -> Tensor:
        assert self.scales is not None
        if isinstance(rows, RowGroups):
            return int4_linear(x_RD, self.values_EFD, self.scales, rows, gated=gated, out_dtype=out_dtype)
        groups = RowGroups(
            num_groups=len(self.values_EFD),
            max_rows=len(x_RD),
            starts=rows.starts,
            experts=torch.arange(len(self.values_EFD), dtype=torch.int32, device=x_RD.device),
            order_R=None,
        )
        out_RF = int4_linear(x_RD, self.values_EFD, self.scales, groups, gated=gated, out_dtype=out_dtype)
        if gated or rows.order_R is None:
            return out_RF
        return torch.empty_like(out_RF).index_copy_(0, rows.order_R.long(), out_RF)
