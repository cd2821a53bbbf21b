"""Smaller numbers for expert weights: float8 with row scales for both factors, or four bits for weights alone.

Float8 (e4m3, largest 448): an output channel's weights share a scale, and so do a row's activations, which are rounded
anew in every step, each row by its own largest element. Four bits: GROUP weights of a channel in a row share a scale;
activations stay as they are, so the only error is that of the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
INT4_MAX = 7  # -8 is not used: the range is symmetric
GROUP = 128  # weights that share a scale; their first half lies in the low four bits of GROUP / 2 bytes


def to_float8(weights_EFD: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights as float8 and a float32 scale per expert and channel [E, F]; weight = value · scale."""
    values_EFD = torch.empty(weights_EFD.shape, dtype=FLOAT8, device=weights_EFD.device)
    scales_EF = torch.empty(weights_EFD.shape[:2], dtype=torch.float32, device=weights_EFD.device)
    for expert, weight_FD in enumerate(weights_EFD):  # one by one: in float32 all at once would not fit
        scale_F = weight_FD.abs().amax(1).float().div_(FLOAT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
        values_EFD[expert] = (weight_FD.float() / scale_F[:, None]).to(FLOAT8)
        scales_EF[expert] = scale_F
    return values_EFD, scales_EF


def from_float8(values_EFD: Tensor, scales_EF: Tensor) -> Tensor:
    """Return the weights that float8 values and scales stand for, in float32."""
    return values_EFD.float() * scales_EF[..., None]


def to_int4(weights_EFD: Tensor) -> tuple[Tensor, Tensor]:
    """Return two weights a byte, uint8 [E, F, D/2], and float32 scales [E, F, D/GROUP]; weight = (bits - 8) · scale."""
    num_experts, num_channels, width = weights_EFD.shape
    if width % GROUP:
        raise ValueError(f"the width {width} does not divide into groups of {GROUP}: keep these weights as they are")
    packed = torch.empty((num_experts, num_channels, width // 2), dtype=torch.uint8, device=weights_EFD.device)
    scales = torch.empty((num_experts, num_channels, width // GROUP), dtype=torch.float32, device=weights_EFD.device)
    for expert, weight_FD in enumerate(weights_EFD):
        groups = weight_FD.float().unflatten(1, (-1, GROUP))
        scale = groups.abs().amax(2).div_(INT4_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
        bits = (groups / scale[..., None]).round_().clamp_(-INT4_MAX, INT4_MAX).add_(8).to(torch.uint8)
        low, high = bits.chunk(2, dim=2)
        packed[expert] = (low | (high << 4)).flatten(1)
        scales[expert] = scale
    return packed, scales


def from_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weights [E, F, D] that `to_int4`'s bytes and scales stand for, in float32."""
    halves = packed.unflatten(2, (-1, GROUP // 2))
    bits = torch.cat([halves & 15, halves >> 4], dim=3)
    return ((bits.float() - 8) * scales[..., None]).flatten(2)


def quantize_rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as float8 and their float32 scales [R]; a row's depend on that row alone."""
    num_rows, width = x_RD.shape
    values_RD = torch.empty((num_rows, width), dtype=FLOAT8, device=x_RD.device)
    scales_R = torch.empty(num_rows, dtype=torch.float32, device=x_RD.device)
    quantize_rows_kernel[(num_rows,)](
        x_RD,
        values_RD,
        scales_R,
        width,
        BLOCK_D=triton.next_power_of_2(width),
        LARGEST=FLOAT8_MAX,
        num_warps=8,
    )
    return values_RD, scales_R


def quantize_rows_reference(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    scales_R = (x_RD.float().abs().amax(1) / FLOAT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (x_RD.float() / scales_R[:, None]).to(FLOAT8), scales_R


@triton.jit
def quantize_rows_kernel(x, values, scales, width, BLOCK_D: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    numbers = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), 0) / LARGEST, 1.1754943508222875e-38)
    tl.store(scales + row, scale)
    tl.store(values + row * width + column, (numbers / scale).to(values.dtype.element_ty), mask=inside)
