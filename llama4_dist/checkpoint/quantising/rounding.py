"""Rounds one linear to a scheme and says what that lost. Scales are those of compressed-tensors' min-max observer.

Source: compressed-tensors `quantization/utils/helpers.py` (calculate_qparams): the largest weight over half the range.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_dist.checkpoint.quantised import FLOAT8, QuantisedLinear, pack
from llama4_dist.checkpoint.scheme import Number, Scheme

HALF_RANGE = {Number.FLOAT8: 448.0, Number.INT8: 127.5, Number.INT4: 7.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingError:
    """What a tensor lost. `relative` is the root mean square of the error over that of the weights."""

    largest: float
    relative: float

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise in decibels; None where nothing was lost."""
        return -20 * math.log10(self.relative) if self.relative else None


def quantise_linear(
    weight_FD: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[QuantisedLinear, RoundingError]:
    """Return the linear rounded to `scheme`, its scales in `scale_dtype`; an output of zeros has a scale too.

    Numbers are made with the scales as they are stored, so that rounding those costs nothing twice.
    """
    num_outputs, width = weight_FD.shape
    num_groups = scheme.num_groups(width)
    groups = weight_FD.float().reshape(num_outputs, num_groups, -1)
    scales_FG = (groups.abs().amax(2) / HALF_RANGE[scheme.number]).to(scale_dtype)
    scales_FG = torch.where(scales_FG == 0, torch.finfo(scale_dtype).eps, scales_FG)
    numbers = _numbers(groups / scales_FG.float()[..., None], scheme.number).flatten(1)
    stored = pack(numbers, scheme.number).view(torch.uint8) if scheme.is_packed else numbers
    linear = QuantisedLinear(scheme=scheme, width=width, stored=stored, scales_FG=scales_FG)
    return linear, rounding_error(weight_FD.float(), linear.dequantise())


def rounding_error(weight_FD: Tensor, rounded_FD: Tensor) -> RoundingError:
    """Compare two weights; sums in float64."""
    lost_FD = rounded_FD - weight_FD
    there = float(weight_FD.square().sum(dtype=torch.float64))
    lost = float(lost_FD.square().sum(dtype=torch.float64))
    return RoundingError(largest=float(lost_FD.abs().max()), relative=math.sqrt(lost / there) if there else 0.0)


def _numbers(quotients: Tensor, number: Number) -> Tensor:
    if number is Number.FLOAT8:
        largest = HALF_RANGE[number]
        return quotients.clamp(-largest, largest).to(FLOAT8)
    limit = 1 << (number.bits - 1)
    return quotients.round_().clamp_(-limit, limit - 1).to(torch.int8)
