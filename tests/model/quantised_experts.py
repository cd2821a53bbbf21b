"""Experts of quantised checkpoints for tests: read, held, asked for rows, and what they mean written out in float64."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_dist.checkpoint.quantised import QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import Number
from llama4_dist.model.expert import Experts

D, F = 64, 96
TOKEN_IDS = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(0)).tolist()
X_RD = torch.randn(40, D, generator=torch.Generator().manual_seed(1))


def in_float64(x_RD: Tensor, weights: QuantisedExpertWeights) -> Tensor:
    """Write the meaning out, with no line of what is tested but the stored tensors."""
    is_float8 = weights.scheme.number is Number.FLOAT8

    def rounded(rows: Tensor) -> Tensor:
        if not is_float8:
            return rows
        scale = (rows.float().abs().amax(1, keepdim=True) / 448).double()
        return (rows.float() / scale.float()).to(torch.float8_e4m3fn).double() * scale

    def weight(linear: QuantisedLinear) -> Tensor:
        scales = linear.scales_FG.double().repeat_interleave(linear.width // linear.scales_FG.shape[1], dim=1)
        return linear.numbers().double() * scales

    gate, up, down = (weight(linear) for linear in weights.linears())
    rows = rounded(x_RD.double())
    gate_RF, up_RF = rows @ gate.T, rows @ up.T
    inner_RF = gate_RF / (1 + (-gate_RF).exp()) * up_RF
    return rounded(inner_RF) @ down.T


def quantised_expert(path: Path, layer: int = 1, expert: int = 3, *cut: int) -> QuantisedExpertWeights:
    weights = Checkpoint.open(path).expert(layer, expert, *cut)
    assert isinstance(weights, QuantisedExpertWeights)
    return weights


def answer(experts: Experts, groups: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Tensor:
    out_RD = torch.full((sum(number for _, number in groups), D), math.nan, dtype=dtype)
    experts(1, groups, X_RD[: len(out_RD)].to(dtype), out_RD)
    return out_RD


def held(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Experts:
    checkpoint = Checkpoint.open(path)
    weights = {(1, expert): checkpoint.expert(1, expert) for expert in range(8)}
    return Experts(weights, width=D, dtype=dtype, device="cpu", **options)
