"""Reads the weights a model part needs from a checkpoint, as stored or in the compute dtype; counts what it read.

Where a model is cut, it reads a member's share of each tensor and touches no other byte.
"""

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.cpu.quantise import QuantisationError
from llama4_dist.model.linear import pack
from llama4_dist.model.weight_format import STORED
from llama4_dist.partition import Share, whole_share


class Weights:
    """Reads tensors by canonical name. One already in `dtype` on the CPU stays a view of the file, unless packed.

    `weight_format` is that of the linears (`model.weight_format`); `quantisation_error` knows what quantised ones lost.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weight_format: str = STORED,
        share: Share | None = None,
    ) -> None:
        """`share` is what the member holds that reads; all of the model if left out."""
        self.share = share or whole_share(checkpoint.config)
        self._checkpoint = checkpoint
        self.dtype = dtype
        self.weight_format = weight_format
        self.quantisation_error = QuantisationError()
        self.device = device
        self._views: dict[str, Tensor] = {}
        self._num_elements: dict[str, int] = {}

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors read, each counted once."""
        return sum(self._num_elements.values())

    def stored(self, name: str) -> Tensor:
        """Return the member's share of one tensor in the dtype it is stored in, a view of the file.

        Of a quantised linear it is a float32 copy of that share.
        """
        if name in self._views:  # a head that is the embedding is asked for twice
            return self._views[name]
        rows, columns = self.share.cut(name)
        share = self._checkpoint.tensor(name, rows=rows, columns=columns)
        self._num_elements[name] = share.numel()
        if name not in self._checkpoint.quantised:
            self._views[name] = share
        return share

    def tensor(self, name: str) -> Tensor:
        """Return the member's share of one tensor in `dtype` on the device."""
        return self.stored(name).to(device=self.device, dtype=self.dtype)

    def linear(self, *names: str) -> Tensor:
        """Return the linears `names` of one input as one packed weight [sum of out, in], for `linear.linear` alone."""
        return pack(torch.cat([self.tensor(name) for name in names]))
