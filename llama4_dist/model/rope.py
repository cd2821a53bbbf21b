"""Rotary position embedding on adjacent pairs, and the attention temperature of layers that have none.

Both depend on a token's absolute position alone, so a step computes them once for all layers.
Source: transformers `Llama4TextRotaryEmbedding`, `Llama4TextAttention`; Meta llama-models `apply_scaling`.
"""

import math

import torch
from torch import Tensor

from llama4_dist.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the angle per position of each pair, float32 [C/2]; llama3 scaling stretches long wavelengths."""
    base = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return base
    turns = scaling.original_max_position * base / (2 * math.pi)  # of a pair over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    band = (turns - low) / (high - low) if high > low else (turns >= low).float()  # published: low == high, no band
    kept = band.clamp(0.0, 1.0)
    return (1.0 - kept) * base / scaling.factor + kept * base


def rotation_table(positions_T: Tensor, frequencies_C: Tensor) -> Tensor:
    """Return unit complex numbers [T, 1, C/2], one per token and pair, shared by all heads."""
    # Rounded to float32 because the references are; at position 1e6 that moves an angle by up to 0.03.
    angles_TC = positions_T.float()[:, None] * frequencies_C
    return torch.polar(torch.ones_like(angles_TC), angles_TC)[:, None, :]


def rotate(x_THC: Tensor, rotation_T1C: Tensor) -> Tensor:
    """Turn each adjacent pair (x[2j], x[2j+1]) by its token's angle, in float32; return x's dtype."""
    pairs_THC = torch.view_as_complex(x_THC.float().view(*x_THC.shape[:-1], -1, 2))
    return torch.view_as_real(pairs_THC * rotation_T1C).flatten(-2).to(x_THC.dtype)


def query_temperature(positions_T: Tensor, floor_scale: float, attn_scale: float) -> Tensor:
    """Return float32 [T]: 1 + attn_scale · ln(1 + floor((p + 1) / floor_scale)), for layers without rotation."""
    return torch.log1p(torch.floor((positions_T.float() + 1.0) / floor_scale)) * attn_scale + 1.0
