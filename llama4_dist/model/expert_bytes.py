"""The memory that an expert, or a slice of its width, takes where it is held and while it is multiplied; pure.

Three forms: floats, as many bytes as their dtype has; eight-bit numbers with a float32 scale an output; and what is
stored in groups, which native passes expand to float32 for a while.
"""

import torch

from llama4_dist.checkpoint.expert_format import ExpertFormat
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.weight_format import INT8

_FLOAT_BYTES = 4


def held_bytes(
    form: ExpertFormat,
    hidden_size: int,
    num_columns: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    weight_format: str,
) -> int:
    """Return what an expert takes for as long as it is held."""
    num_weights = 3 * hidden_size * num_columns
    if _is_packed(form, dtype, device, weight_format):
        return num_weights + _FLOAT_BYTES * (2 * num_columns + hidden_size)
    if form.scheme is not None and torch.device(device).type == "cpu":
        return form.slice_bytes(hidden_size, num_columns)
    return num_weights * dtype.itemsize


def computed_bytes(
    form: ExpertFormat,
    hidden_size: int,
    num_columns: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    weight_format: str,
) -> int:
    """Return what an expert has in memory from its rows on until it is let go."""
    if form.scheme is not None and form.scheme.group_size is not None and is_native(dtype, device):
        return 3 * hidden_size * num_columns * _FLOAT_BYTES
    return held_bytes(form, hidden_size, num_columns, dtype=dtype, device=device, weight_format=weight_format)


def _is_packed(form: ExpertFormat, dtype: torch.dtype, device: torch.device | str, weight_format: str) -> bool:
    """Tell whether native passes multiply eight-bit numbers, a copy of their own."""
    if form.scheme is None:
        return weight_format == INT8
    return form.scheme.group_size is None and is_native(dtype, device)
