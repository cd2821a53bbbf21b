"""Reads the weights a model part needs from a checkpoint, in the compute dtype, on the device; counts what it read."""

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.linear import pack


class Weights:
    """Reads tensors by canonical name. One already in `dtype` on the CPU stays a view of the file, unless packed."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self.dtype = dtype
        self._device = device
        self.num_parameters = 0

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as stored."""
        tensor = self._checkpoint.tensor(name)
        self.num_parameters += tensor.numel()
        return tensor.to(device=self._device, dtype=self.dtype)

    def linear(self, *names: str) -> Tensor:
        """Return the linears `names` of one input as one packed weight [sum of out, in], for `linear.linear` alone."""
        return pack(torch.cat([self.tensor(name) for name in names]))
