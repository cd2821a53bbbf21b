"""Decides between two hosts whose answers differ: computes the rows here, from the checkpoint. Knows no host."""

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.links.wire import WireFormat
from llama4_dist.engine.devices import open_experts


class Referee:
    """Satisfies `dispatch.cross_check.Referee`. Holds an expert only while it computes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        weights: str,
        num_slices: int = 1,
        wire: str = "",
    ) -> None:
        self._experts = open_experts(
            checkpoint, dtype=dtype, device=device, weight_format=weights, num_slices=num_slices
        )
        self._device = torch.device(device)
        self._form = WireFormat(wire, checkpoint.config.hidden_size, dtype)

    def __call__(self, layer: int, unit: int, x_RD: Tensor) -> Tensor:
        """Return the outputs of an expert, or of a slice of one, of `x_RD`, where those rows lie, as both arrive."""
        pair = (layer, unit)
        rows_RD = self._form.round(x_RD).to(self._device)
        y_RD = torch.empty_like(rows_RD)
        self._experts.add([pair])
        try:
            self._experts(layer, ((unit, len(rows_RD)),), rows_RD, y_RD)
        finally:
            self._experts.remove([pair])
        return self._form.round(y_RD.to(x_RD.device))
