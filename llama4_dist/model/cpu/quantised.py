"""Makes networks for the native passes of quantised experts, as exact as what is stored.

With a scale an output the stored numbers are multiplied themselves: float8, or int8, which holds int4 too. Where groups
of inputs have scales an expert is expanded to float32.
"""

import torch
from torch import Tensor

from llama4_dist.checkpoint.quantised import FLOAT8, QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.model.cpu.feed_forward import Network, packed_network
from llama4_dist.model.cpu.panels import Panels, pack
from llama4_dist.native.bindings import passes

_SCALE_BYTES = 4


def is_multiplied_as_stored(scheme: Scheme) -> bool:
    """Tell whether native passes multiply the stored numbers, which takes no more memory than one byte a weight."""
    return scheme.group_size is None


def stored_network(weights: QuantisedExpertWeights) -> Network:
    """Return a network of the stored numbers and scales, which is a copy."""
    return packed_network(*[numbers_in_panels(linear) for linear in weights.linears()])


def expanded_network(weights: QuantisedExpertWeights) -> Network:
    """Return a network of the float32 weights that an expert stands for: four bytes a weight."""
    return packed_network(*[pack(linear.dequantise()) for linear in weights.linears()])


def numbers_in_panels(linear: QuantisedLinear) -> Panels:
    """Pack a linear that has a scale an output; an output with a NaN among its weights gets NaN for a scale."""
    native = passes()
    assert native is not None, "asked to pack without native passes"
    assert is_multiplied_as_stored(linear.scheme), "groups have scales of their own"
    strip = native.l4d_strip()
    numbers_FD = linear.numbers()
    num_outputs, width = numbers_FD.shape
    num_strips = -(-num_outputs // strip)
    num_values = num_strips * width * strip
    memory = torch.zeros(num_values + num_strips * strip * _SCALE_BYTES, dtype=torch.uint8)
    strips = memory[:num_values].view(num_strips, width, strip)
    padded = torch.nn.functional.pad(numbers_FD.view(torch.uint8), (0, 0, 0, -num_outputs % strip))
    strips.copy_(padded.view(num_strips, strip, width).transpose(1, 2))
    scales_F = memory[num_values:].view(torch.float32)[:num_outputs]
    scales_F.copy_(_visible_scales(linear))
    return Panels(strips=strips.view(numbers_FD.dtype), num_outputs=num_outputs, scales_F=scales_F)


def _visible_scales(linear: QuantisedLinear) -> Tensor:
    scales_F = linear.scales_FG[:, 0].float()
    if linear.stored.dtype != FLOAT8:
        return scales_F
    is_nan_F = (linear.stored.view(torch.uint8) & 0x7F).amax(1) == 0x7F
    return torch.where(is_nan_F, torch.nan, scales_F)
