"""Reads the weights a model part needs from a checkpoint, as stored or in the compute dtype; counts what it read."""

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.cpu.quantise import QuantisationError
from llama4_dist.model.linear import pack
from llama4_dist.model.weight_format import STORED


class Weights:
    """Reads tensors by canonical name. One already in `dtype` on the CPU stays a view of the file, unless packed.

    `weight_format` is that of the linears (`model.weight_format`); `quantisation_error` knows what quantised ones lost.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, weight_format: str = STORED
    ) -> None:
        self._checkpoint = checkpoint
        self.dtype = dtype
        self.weight_format = weight_format
        self.quantisation_error = QuantisationError()
        self._device = device
        self._views: dict[str, Tensor] = {}
        self._num_elements: dict[str, int] = {}

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors read, each counted once."""
        return sum(self._num_elements.values())

    def stored(self, name: str) -> Tensor:
        """Return one tensor in the dtype it is stored in, a view of the file; of a quantised one a float32 copy."""
        if name in self._views:  # a head that is the embedding is asked for twice
            return self._views[name]
        tensor = self._checkpoint.tensor(name)
        self._num_elements[name] = tensor.numel()
        if name not in self._checkpoint.quantised:
            self._views[name] = tensor
        return tensor

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in `dtype` on the device."""
        return self.stored(name).to(device=self._device, dtype=self.dtype)

    def linear(self, *names: str) -> Tensor:
        """Return the linears `names` of one input as one packed weight [sum of out, in], for `linear.linear` alone."""
        return pack(torch.cat([self.tensor(name) for name in names]))
