"""What a quantised expert computes, as plainly as it can be said: the reference, and the path where nothing is faster.

float8 weights multiply rows that were rounded to float8 (W8A8), integers multiply rows as they are (W8A16, W4A16).
Sources: compressed-tensors `quantization/lifecycle/forward.py` (dynamic scales by token), Llama 4's published float8
checkpoint, which is made for this.
"""

import torch
from torch import Tensor

from llama4_dist.checkpoint.quantised import FLOAT8, QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.scheme import Number
from llama4_dist.model.activation import swiglu
from llama4_dist.model.linear import linear

FLOAT8_MAX = 448.0


def apply_quantised_expert(x_RD: Tensor, weights: QuantisedExpertWeights, out_RD: Tensor) -> None:
    """Write down(silu(gate x) · up x), computed in float64 if the rows are, else in float32.

    A slice of an expert's width rounds its own part of the inner rows by that part's largest element, as a rank of
    tensor parallelism does.
    """
    x_RD = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    inner_RF = swiglu(quantised_linear(x_RD, weights.gate_FD), quantised_linear(x_RD, weights.up_FD))
    out_RD.copy_(quantised_linear(inner_RF, weights.down_DF))


def quantised_linear(x_RD: Tensor, weight_FD: QuantisedLinear) -> Tensor:
    """Return rows @ weightᵀ [R, F] in the rows' dtype, float32 or float64; no row changes another's bits."""
    if weight_FD.scheme.number is Number.FLOAT8:
        x_RD = rounded_to_float8(x_RD)
    return linear(x_RD, weight_FD.dequantise(x_RD.dtype))


def rounded_to_float8(x_RD: Tensor) -> Tensor:
    """Return each row as float8 numbers times one scale, its largest element over 448; a row of zeros stays one.

    Scale and quotient are float32's whatever the rows are: in float64 a quotient that lies between two float8 numbers
    could fall to another side.
    """
    x32_RD = x_RD.float()
    scale_R1 = x32_RD.abs().amax(1, keepdim=True) / FLOAT8_MAX
    numbers_RD = (x32_RD / torch.where(scale_R1 == 0, 1.0, scale_R1)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return numbers_RD.to(x_RD.dtype) * scale_R1.to(x_RD.dtype)
