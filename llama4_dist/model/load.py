"""Chooses the decoder for a device, and names the choice.

Native passes compute on a processor, torch elsewhere and where there is no compiler.
"""

from collections.abc import Callable

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.cpu.llama4 import CpuLlama4
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.llama4 import Llama4
from llama4_dist.model.weights import Weights


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> CpuLlama4 | Llama4:
    """Read all weights but the routed experts'; `progress` is told (layers read, layers in all)."""
    weights = Weights(checkpoint, dtype=dtype, device=torch.device(device))
    decoder = CpuLlama4 if is_native(dtype, device) else Llama4
    return decoder(checkpoint.config, weights, progress=progress)


def arithmetic(dtype: torch.dtype, device: torch.device | str) -> str:
    """Name what computes here; two kinds of arithmetic round differently, so one cluster has one kind.

    Native passes have the same bits on every processor; torch's are its libraries'.
    """
    if is_native(dtype, device):
        return "native"
    return f"torch-{torch.device(device).type}"
