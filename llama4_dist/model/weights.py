"""Reads the weights a model part needs from a checkpoint, in the compute dtype, on the device; counts what it read."""

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint


class Weights:
    """Reads tensors by canonical name. A tensor already in `dtype` on the CPU stays a view of the mapped file."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self.num_parameters = 0

    def matrix(self, name: str) -> Tensor:
        """Return one tensor as stored ([out, in] for a linear)."""
        tensor = self._checkpoint.tensor(name)
        self.num_parameters += tensor.numel()
        return tensor.to(device=self._device, dtype=self._dtype)

    def stacked(self, *names: str) -> Tensor:
        """Return several linears of the same input as one [sum of out, in] matrix, for one product instead of many."""
        return torch.cat([self.matrix(name) for name in names])
