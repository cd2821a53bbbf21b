"""Reads linears of a checkpoint as the native passes want them: packed, in the format that was asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_dist.model.cpu.panels import Panels, pack
from llama4_dist.model.cpu.quantise import quantise
from llama4_dist.model.weight_format import INT8
from llama4_dist.model.weights import Weights


def read_linear(weights: Weights, *names: str) -> Panels:
    """Return the linears `names` of one input as one weight. int8 is made from what is stored, not from the dtype."""
    if weights.weight_format == INT8:
        return quantise(_joined([weights.stored(name) for name in names]).T, weights.quantisation_error)
    return pack(_joined([weights.tensor(name) for name in names]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
