"""Chooses the decoder of this folder for a device, and names the choice; `engine.devices` knows those of `gpu` too.

Native passes compute on a processor, torch elsewhere and where there is no compiler.
"""

import logging
from collections.abc import Callable

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.cpu.llama4 import CpuLlama4
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.llama4 import Llama4
from llama4_dist.model.reduction import Reduction
from llama4_dist.model.weight_format import INT8, STORED, check_stored_format, check_weight_format
from llama4_dist.model.weights import Weights
from llama4_dist.partition import Share

log = logging.getLogger(__name__)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    weight_format: str = STORED,
    share: Share | None = None,
    reduction: Reduction | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CpuLlama4 | Llama4:
    """Read all weights but the routed experts'; `progress` is told (layers read, layers in all).

    With a `share` it is a member's part of the model, which needs a `reduction` where its stage has several ranks.
    Raises ConfigError where `weight_format` cannot be computed.
    """
    check_weight_format(weight_format, dtype=dtype, device=device)
    check_stored_format(weight_format, checkpoint.scheme)
    weights = Weights(checkpoint, dtype=dtype, device=torch.device(device), weight_format=weight_format, share=share)
    if (weights.share.num_ranks > 1) != (reduction is not None):
        raise ValueError(f"a stage of {weights.share.num_ranks} ranks was given {reduction=}: one rank takes none")
    decoder = CpuLlama4 if is_native(dtype, device) else Llama4
    model = decoder(checkpoint.config, weights, reduction=reduction, progress=progress)
    if weight_format == INT8:
        log.info("weights_quantised part=attention_side %s", weights.quantisation_error)
    return model


def arithmetic(dtype: torch.dtype, device: torch.device | str, weight_format: str = STORED) -> str:
    """Name what computes here; two kinds of arithmetic round differently, so one cluster has one kind.

    Native passes have the same bits on every processor; torch's are its libraries'. int8 weights are other weights.
    """
    if is_native(dtype, device):
        return "native" if weight_format == STORED else f"native-{weight_format}"
    return f"torch-{torch.device(device).type}"
