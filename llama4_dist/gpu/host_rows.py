"""The way of a layer's routed rows from the device to the experts' hosts and back: one copy out, one copy in.

Sockets read the host's memory, so everything passes through there; the dispatcher sees rows of the host and no device.
"""

from typing import Any

import torch
from torch import Tensor

from llama4_dist.gpu.pinned import PinnedMemory, wait_for
from llama4_dist.model.dispatcher import Dispatcher


class HostRows:
    """Page-locked memory for the rows of one part of a step, and its two ways; one layer is on its way at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows, self._choice, self._answers = (PinnedMemory(device) for _ in range(3))
        self._ones_N1 = torch.empty(0, 1)

    def dispatch(
        self, layer: int, copies_ND: Tensor, experts_N: Tensor, dispatcher: Dispatcher, microbatch: int
    ) -> Any:
        """Send copies that are scored already, each to its expert (int32); return what `combine` takes.

        Waits for the device, which has to say who gets the rows.
        """
        num_copies, width = copies_ND.shape
        rows_ND = self._rows.rows(num_copies, width, copies_ND.dtype)
        choice_N1 = self._choice.rows(num_copies, 1, torch.int32)
        rows_ND.copy_(copies_ND, non_blocking=True)
        choice_N1.copy_(experts_N[:, None], non_blocking=True)
        wait_for(self._device)
        # A copy is a token of its own here, so that the sum over a token's copies is left to the device.
        return dispatcher.dispatch(layer, rows_ND, choice_N1.to(torch.int64), self._ones(rows_ND), microbatch)

    def combine(self, in_flight: Any, dispatcher: Dispatcher, out_ND: Tensor) -> None:
        """Wait for the answers and have them copied to `out_ND`, each where its copy was."""
        y_ND = dispatcher.combine(in_flight)
        # `dispatch` has waited since the copy of the layer before, so nobody reads this memory any more.
        answers_ND = self._answers.rows(len(y_ND), y_ND.shape[1], y_ND.dtype)
        answers_ND.copy_(y_ND)
        out_ND.copy_(answers_ND, non_blocking=True)

    def _ones(self, rows_ND: Tensor) -> Tensor:
        if len(self._ones_N1) < len(rows_ND) or self._ones_N1.dtype != rows_ND.dtype:
            self._ones_N1 = torch.ones((len(rows_ND), 1), dtype=rows_ND.dtype)
        return self._ones_N1[: len(rows_ND)]
