"""Multiplies groups of rows by input-major weights, each group by its own, with the bits that `linear` gives.

The native pass reads weights where they lie, all of them in one call; a matrix product of the library copies each one
into another layout first. Measured from memory on [768, 2048] float32 weights, two threads: 165 us for one to six
rows, 240 for sixteen, 530 for 64, where `linear` takes 305 to 330, 380 and 670.
"""

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from llama4_dist.model.linear import linear
from llama4_dist.native.library import library

MAX_ROWS = 64  # of one weight; `linear` takes more, and is as fast from some hundred rows on
SUMS = (512, 1024)  # how many products oneDNN adds up one by one, by width, before it adds up the sums
NUM_CHECKED_ROWS, NUM_CHECKED_COLUMNS = 8, 256


def project_groups(x_RD: Tensor, nums_rows: Sequence[int], weights_DF: Sequence[Tensor], out_RF: Tensor) -> None:
    """Write each group's rows times its weight into `out_RF`; a row's bits do not depend on the number of rows.

    `nums_rows` are the groups' sizes, one group after the other; all weights have one shape and layout.
    """
    first_DF = weights_DF[0]
    assert (x_RD.shape[1], out_RF.shape[1]) == first_DF.shape, "rows and weight do not fit"
    summed_together = products_summed_together(x_RD, first_DF, out_RF)
    first_rows: list[int] = []
    few: list[int] = []
    pointers: list[int] = []
    start = 0
    for num_rows, weight_DF in zip(nums_rows, weights_DF, strict=True):
        stop = start + num_rows
        if summed_together and num_rows <= MAX_ROWS:
            first_rows.append(start)
            few.append(num_rows)
            assert weight_DF.shape == first_DF.shape, "weights differ in shape"
            assert weight_DF.stride() == first_DF.stride(), "weights differ in layout"
            pointers.append(weight_DF.data_ptr())
        else:
            out_RF[start:stop] = linear(x_RD[start:stop], weight_DF.T)
        start = stop
    assert start == len(x_RD) == len(out_RF), "groups do not cover the rows"
    if few:
        multiply_few_rows(x_RD, first_rows, few, first_DF, pointers, out_RF, summed_together)


def warm_up(widths: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
    """Compile the native pass and try its sums for weights of these widths, before the first row waits for it."""
    if dtype == torch.float32 and device.type == "cpu" and passes() is not None:
        for width in widths:
            exact_sums(width)


def multiply_few_rows(
    x_RD: Tensor,
    first_rows: Sequence[int],
    nums_rows: Sequence[int],
    weight_DF: Tensor,
    pointers: Sequence[int],
    out_RF: Tensor,
    summed_together: int,
) -> None:
    """Run the native pass over groups of rows; `weight_DF` stands for the shape of the weights at `pointers`."""
    native = passes()
    assert native is not None, "asked for without a library"
    num_groups = len(pointers)
    native.l4d_multiply_few_rows(
        x_RD.data_ptr(),
        x_RD.stride(0),
        out_RF.data_ptr(),
        out_RF.stride(0),
        *weight_DF.shape,
        num_groups,
        (ctypes.c_int64 * num_groups)(*first_rows),
        (ctypes.c_int64 * num_groups)(*nums_rows),
        (ctypes.c_void_p * num_groups)(*pointers),
        weight_DF.stride(0),
        summed_together,
        torch.get_num_threads(),
    )


def products_summed_together(x_RD: Tensor, weight_DF: Tensor, out_RF: Tensor) -> int:
    """Return how the native pass has to sum to give `linear`'s bits for these tensors; 0 where it cannot."""
    # bfloat16 stays out: its rounding would hide from a trial most sums that differ, not all.
    if x_RD.dtype != torch.float32 or not x_RD.is_cpu or passes() is None:
        return 0
    if not x_RD.stride(1) == weight_DF.stride(1) == out_RF.stride(1) == 1:
        return 0
    return exact_sums(weight_DF.shape[0])


@cache
def passes() -> ctypes.CDLL | None:
    """Return the native passes; a call lets other Python threads run."""
    path = library()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.l4d_multiply_few_rows.argtypes = (
        *(pointer, size, pointer, size),  # x, y, each with its stride
        *(size, size),  # width, columns
        *(size, pointer, pointer, pointer, size),  # groups: number, first rows, numbers of rows, weights, their stride
        *(size, ctypes.c_int),  # products summed together, threads
    )
    loaded.l4d_multiply_few_rows.restype = None
    return loaded


@cache
def exact_sums(width: int) -> int:
    """Find, by trying, the order of summation that `linear` has on this machine for this width; 0 if none of ours.

    Seen with oneDNN: sums of 512 products up to a width of 1024, of 1024 above.
    """
    generator = torch.Generator().manual_seed(0)
    weight_DF = torch.randn(width, NUM_CHECKED_COLUMNS, generator=generator)
    x_RD = torch.randn(NUM_CHECKED_ROWS, width, generator=generator)
    out_RF = torch.empty(NUM_CHECKED_ROWS, NUM_CHECKED_COLUMNS)
    expected_RF = linear(x_RD, weight_DF.T)
    for summed_together in SUMS:
        multiply_few_rows(x_RD, [0], [len(x_RD)], weight_DF, [weight_DF.data_ptr()], out_RF, summed_together)
        if torch.equal(out_RF, expected_RF):
            return summed_together
    return 0
