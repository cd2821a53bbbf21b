"""The routed experts of one host: a stateless function of (layer, expert, rows)."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.model.activation import swiglu
from llama4_dist.model.few_rows import project


class Experts:
    """Holds weights by (layer, expert) and applies them to rows. Weights already in `dtype` on `device` are not copied.

    `width` is the model's width D.
    """

    def __init__(
        self,
        weights: Mapping[tuple[int, int], ExpertWeights],
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.width = width
        self._weights = {key: _moved(value, dtype, device) for key, value in weights.items()}
        self.holds = frozenset(self._weights)

    @torch.inference_mode()
    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        """Write the outputs of `x_RD` into `out_RD`; `groups` are (expert, number of rows), one after the other.

        Rows come already multiplied by the router's score: Llama 4 scales what an expert reads.
        """
        start = 0
        for expert, num_rows in groups:
            stop = start + num_rows
            if num_rows:
                out_RD[start:stop] = apply_expert(x_RD[start:stop], self._weights[layer, expert])
            start = stop
        assert start == len(x_RD) == len(out_RD), "groups do not cover the rows"


def apply_expert(x_RD: Tensor, weights: ExpertWeights) -> Tensor:
    """Return down(silu(gate x) · up x)."""
    if weights.gate_up_D2F is None:
        gate_RF, up_RF = project(x_RD, weights.gate_DF), project(x_RD, weights.up_DF)
    else:
        gate_RF, up_RF = project(x_RD, weights.gate_up_D2F).chunk(2, dim=-1)
    return project(swiglu(gate_RF, up_RF), weights.down_FD)


def _moved(weights: ExpertWeights, dtype: torch.dtype, device: torch.device | str) -> ExpertWeights:
    """Return the weights in `dtype` on `device`; gate and up remain views of the one matrix where there is one."""
    moved = {f.name: getattr(weights, f.name) for f in fields(weights)}
    moved = {name: None if t is None else t.to(device=device, dtype=dtype) for name, t in moved.items()}
    if moved["gate_up_D2F"] is not None:
        moved["gate_DF"], moved["up_DF"] = moved["gate_up_D2F"].chunk(2, dim=-1)
    return ExpertWeights(**moved)
