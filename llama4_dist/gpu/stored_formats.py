"""Lays out experts that a checkpoint stores quantised for the kernels, without rounding a weight a second time.

float8 goes to the float8 products as it is; int4 in groups of GROUP to the four-bit ones, its nibbles in another order.
What no kernel multiplies, int8 and other groups, becomes the stored weights' values in the compute dtype.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llama4_dist.checkpoint.quantised import FLOAT8, QuantisedLinear
from llama4_dist.checkpoint.scheme import Number, Scheme
from llama4_dist.gpu.packed import Packed
from llama4_dist.gpu.quantize import GROUP


def kernel_of(scheme: Scheme) -> str:
    """Return which of `packed.FORMATS` multiplies weights of a scheme; "stored": their values."""
    if scheme.number is Number.FLOAT8:
        return "float8"
    return "int4" if scheme.number is Number.INT4 and scheme.group_size == GROUP else "stored"


def pack_experts(
    experts: Iterable[Sequence[QuantisedLinear]], num_experts: int, *, dtype: torch.dtype, device: torch.device
) -> Packed:
    """Return one entry an expert, the outputs of its linears one after the other; experts are converted one by one."""
    values: Tensor | None = None
    scales: Tensor | None = None
    for expert, linears in enumerate(experts):
        parts = [_converted(linear, dtype) for linear in linears]
        value = torch.cat([part.view(torch.uint8) if part.itemsize == 1 else part for part, _ in parts])
        if values is None:
            values = torch.empty((num_experts, *value.shape), dtype=value.dtype, device=device)
        values[expert] = value
        if parts[0][1] is not None:
            scale = torch.cat([part for _, part in parts if part is not None])
            if scales is None:
                scales = torch.empty((num_experts, *scale.shape), dtype=torch.float32, device=device)
            scales[expert] = scale
    assert values is not None, "a MoE layer has experts"
    is_float8 = scales is not None and scales.ndim == 2
    return Packed(values_EFD=values.view(FLOAT8) if is_float8 else values, scales=scales)


def _converted(linear: QuantisedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    match kernel_of(linear.scheme):
        case "float8":
            return linear.stored, linear.scales_FG[:, 0].float()
        case "int4":
            return halves_together(linear.numbers()), linear.scales_FG.float()
        case _:
            return linear.dequantise(dtype), None


def halves_together(numbers_FD: Tensor) -> Tensor:
    """Return numbers from -8 to 7 as `quantize.to_int4` lays them out: uint8 [F, D / 2]."""
    low, high = numbers_FD.add(8).view(torch.uint8).unflatten(1, (-1, GROUP)).chunk(2, dim=2)
    packed: Tensor = (low | (high << 4)).flatten(1)
    return packed
