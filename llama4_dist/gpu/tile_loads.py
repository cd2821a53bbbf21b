"""Device functions the kernels share."""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    source, row, column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr
):
    """[ROWS, COLUMNS] of a row-major matrix from (row, column) on; zeros beyond its edges."""
    if DESCRIBED:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tile = tl.load(source + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def matrix_at(addresses, entry, dtype: tl.constexpr):
    """The matrix that lies at addresses[entry], which is a multiple of 16: whole vectors are loaded from it."""
    return tl.multiple_of(tl.load(addresses + entry).to(tl.pointer_type(dtype)), 16)


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr, IMPRECISE: tl.constexpr):
    """total + a @ b in float32; "upcast" is for the interpreter, which cannot multiply bfloat16."""
    if PRECISION == "upcast":
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
    return total


@triton.jit
def silu_times(gate, up):
    """silu(gate) · up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up
