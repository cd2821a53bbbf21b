"""Chooses what computes on a device, and names the choice.

Triton's kernels compute on a CUDA device, native passes on a processor; torch where there is neither Triton nor a
compiler (`model.load`). Triton's decoder is not cut: a member of a group computes with torch on a CUDA device. That has
not been run on a GPU yet.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.one_device import MeasuredModel
from llama4_dist.model import load
from llama4_dist.model.cpu.llama4 import CpuLlama4
from llama4_dist.model.expert_cut import ExpertCut
from llama4_dist.model.expert_store import ExpertStore
from llama4_dist.model.llama4 import Llama4
from llama4_dist.model.reduction import Reduction
from llama4_dist.model.weight_format import STORED, check_weight_format
from llama4_dist.partition import Share

_TRITON_DTYPES = (torch.float32, torch.bfloat16)


def is_triton(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Tell whether the kernels of `llama4_dist.gpu` compute there."""
    return torch.device(device).type == "cuda" and dtype in _TRITON_DTYPES and find_spec("triton") is not None


def arithmetic(dtype: torch.dtype, device: torch.device | str, weight_format: str = STORED) -> str:
    """Name what computes there; two kinds of arithmetic round differently, so one cluster has one kind.

    Triton's kernels have the same bits on cards of one kind and with one version of Triton, which the name leaves out.
    """
    if is_triton(dtype, device):
        return "triton-cuda"
    return load.arithmetic(dtype, device, weight_format)


def rows_device(dtype: torch.dtype, device: str) -> str:
    """Return where a dispatcher is given rows: Triton's decoder brings them to the host itself, in one copy."""
    return "cpu" if is_triton(dtype, device) else device


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    weight_format: str = STORED,
    progress: Callable[[int, int], None] | None = None,
) -> MeasuredModel:
    """Read all weights but the routed experts'; `progress` is told (layers read, layers in all).

    Raises ConfigError where `weight_format` cannot be computed.
    """
    if not is_triton(dtype, device):
        return load.load_model(checkpoint, dtype=dtype, device=device, weight_format=weight_format, progress=progress)
    check_weight_format(weight_format, dtype=dtype, device=device)
    from llama4_dist.gpu.decoder import GpuDecoder  # needs Triton, which only such a device does

    return GpuDecoder.load(checkpoint, dtype=dtype, device=device, progress=progress)


def load_member(
    checkpoint: Checkpoint,
    *,
    share: Share,
    reduction: Reduction | None,
    dtype: torch.dtype,
    device: str,
    weight_format: str = STORED,
    progress: Callable[[int, int], None] | None = None,
) -> CpuLlama4 | Llama4:
    """Read a member's share of the weights; `reduction` is its way to the other ranks, None where there is one rank.

    Its rows lie on `device`, and so do those that its dispatcher is given. Raises ConfigError where `weight_format`
    cannot be computed.
    """
    return load.load_model(
        checkpoint,
        dtype=dtype,
        device=device,
        weight_format=weight_format,
        share=share,
        reduction=reduction,
        progress=progress,
    )


def open_experts(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    weight_format: str = STORED,
    num_slices: int = 1,
    capacity_bytes: int | None = None,
    residency_bytes: int | None = None,
) -> ExpertStore:
    """Return a store, empty yet, of experts that are computed on `device`; see `ExpertStore`.

    Raises ConfigError where `weight_format`, the cut or the bound cannot be.
    """
    check_weight_format(weight_format, dtype=dtype, device=device)
    experts = None
    if is_triton(dtype, device):
        from llama4_dist.gpu.experts import GpuExperts

        config = checkpoint.config
        cut = ExpertCut.of(checkpoint, dtype=dtype, device=device, weight_format=weight_format, num_slices=num_slices)
        experts = GpuExperts(
            width=config.hidden_size,
            expert_width=cut.most_columns,
            num_experts=config.num_experts * num_slices,
            dtype=dtype,
            device=device,
        )
    return ExpertStore(
        checkpoint,
        dtype=dtype,
        device=device,
        weight_format=weight_format,
        num_slices=num_slices,
        capacity_bytes=capacity_bytes,
        residency_bytes=residency_bytes,
        experts=experts,
    )
