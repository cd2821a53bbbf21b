"""Tile shapes of the kernels, and how a kernel is handed a matrix: by a tensor-map descriptor or by a bare pointer.

A tile decides speed alone. Every kernel adds up along K in ascending order into one float32 accumulator per element, so
no choice made here changes which products are added in which order (float8: see `max_imprecise`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
DESCRIPTOR_ALIGNMENT = 16  # bytes; of a tensor map's address and of all its strides but the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Block sizes of one matrix kernel. `block_n` counts columns of the output; a gated one takes two weights.

    `programs_per_sm` 0 starts one program a tile; otherwise programs stay and walk over tiles, and with `is_flat` they
    load the next tile's first blocks while they store the last tile. `use_descriptors` loads through the copy engine's
    tensor maps, else through pointers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3
    programs_per_sm: int = 0
    is_flat: bool = False
    use_descriptors: bool = True


def matrix_source(matrix_RD: Tensor, block_rows: int, block_columns: int, use_descriptors: bool) -> Any:
    """Return what a kernel loads `matrix_RD` through; a matrix that no tensor map can describe is passed as it is."""
    if use_descriptors and can_describe(matrix_RD):
        return TensorDescriptor.from_tensor(matrix_RD, [block_rows, block_columns])
    return matrix_RD


def can_describe(matrix_RD: Tensor) -> bool:
    """Whether the copy engine accepts the matrix: aligned address and rows, dense columns."""
    row_bytes = matrix_RD.stride(0) * matrix_RD.element_size()
    is_aligned = row_bytes % DESCRIPTOR_ALIGNMENT == 0 and matrix_RD.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    return is_aligned and matrix_RD.stride(1) == 1


def precision_of(dtype: torch.dtype) -> str:
    """Return how `tile_loads.add_product` multiplies `dtype`: float32 in full, never through tf32."""
    if dtype == torch.bfloat16 and IS_INTERPRETED:
        return "upcast"
    return "ieee" if dtype == torch.float32 else "tf32"


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
