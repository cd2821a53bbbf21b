"""Multiplies a few rows by an input-major weight at the speed of reading it, with the bits that `linear` gives.

A row of x @ W is a sum of W's rows weighted by x, which is what an embedding bag computes: it streams W once, where a
matrix product copies it into another layout first. Measured from memory on a [1024, 1024] float32 weight: 126 us for
one row, 250 for four; `linear` takes 360 to 390 for one to four.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_dist.model.linear import linear

MAX_ROWS = 4
SUMMED_TOGETHER = 512  # oneDNN sums this many products one by one, and then adds up the sums
NUM_CHECKED_COLUMNS = 512


def project(x_RD: Tensor, weight_DF: Tensor) -> Tensor:
    """Return x_RD @ weight_DF as [R, F]; a row's bits do not depend on the number of rows."""
    # bfloat16 stays out: its rounding would hide from a trial most sums that differ, not all.
    is_possible = x_RD.device.type == "cpu" and x_RD.dtype == torch.float32 and weight_DF.is_contiguous()
    if is_possible and len(x_RD) <= MAX_ROWS and is_exact(*weight_DF.shape):
        return sum_of_rows(x_RD, weight_DF)
    return linear(x_RD, weight_DF.T)


def sum_of_rows(x_RD: Tensor, weight_DF: Tensor) -> Tensor:
    """Return x_RD @ weight_DF as a weighted sum of the weight's rows."""
    indices_N, starts_N = _bags(*x_RD.shape)
    parts_NF = F.embedding_bag(indices_N, weight_DF, starts_N, mode="sum", per_sample_weights=x_RD.reshape(-1))
    first_RF, *others = parts_NF.view(len(x_RD), -1, weight_DF.shape[1]).unbind(1)
    for part_RF in others:
        first_RF = first_RF + part_RF
    return first_RF


@cache
def is_exact(width: int, num_columns: int) -> bool:
    """Tell, by trying, whether float32 sums of rows have the bits of `linear` on this machine.

    Up to a width of 1024 they do where oneDNN is used; above, it adds up its sums in another order.
    """
    generator = torch.Generator().manual_seed(0)
    weight_DF = torch.randn(width, min(num_columns, NUM_CHECKED_COLUMNS), generator=generator)
    x_RD = torch.randn(MAX_ROWS, width, generator=generator)
    return torch.equal(sum_of_rows(x_RD, weight_DF), linear(x_RD, weight_DF.T))


@cache
def _bags(num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the weight's row numbers, once per row of x, and where each bag of SUMMED_TOGETHER starts."""
    starts_R1 = torch.arange(num_rows)[:, None] * width
    starts_RN = starts_R1 + torch.arange(0, width, SUMMED_TOGETHER)
    return torch.arange(width).repeat(num_rows), starts_RN.flatten()
