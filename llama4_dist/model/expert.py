"""The routed experts of one host: a stateless function of (layer, expert, rows)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.model.activation import swiglu
from llama4_dist.model.few_rows import MAX_ROWS, project_groups, warm_up


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
        self.dtype = dtype
        self.device = torch.device(device)
        self._weights: dict[tuple[int, int], ExpertWeights] = {}
        self.holds: frozenset[tuple[int, int]] = frozenset()
        self.put(weights)

    def put(self, weights: Mapping[tuple[int, int], ExpertWeights]) -> None:
        """Hold more experts; rows of others may be computed meanwhile, in another thread."""
        moved = {key: _moved(value, self.dtype, self.device) for key, value in weights.items()}
        warm_up({self.width, *(held.down_FD.shape[0] for held in moved.values())}, self.dtype, self.device)
        self._weights = {**self._weights, **moved}
        self.holds = frozenset(self._weights)

    def drop(self, pairs: Collection[tuple[int, int]]) -> None:
        """Hold these no longer. Rows that are being computed end well: they have the weights in hand."""
        self.holds -= frozenset(pairs)
        self._weights = {key: value for key, value in self._weights.items() if key in self.holds}

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return the weights of a held expert, as they are multiplied."""
        return self._weights[layer, expert]

    @torch.inference_mode()
    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        """Write the outputs of `x_RD` into `out_RD`; `groups` are (expert, number of rows), one after the other.

        Rows come already multiplied by the router's score: Llama 4 scales what an expert reads.
        """
        covered = sum([num_rows for _, num_rows in groups])
        assert covered == len(x_RD) == len(out_RD), "groups do not cover the rows"
        start = 0
        for run in runs(groups):
            nums_rows = [num_rows for _, num_rows in run]
            stop = start + sum(nums_rows)
            weights = [self._weights[layer, expert] for expert, _ in run]
            apply_experts(x_RD[start:stop], nums_rows, weights, out_RD[start:stop])
            start = stop


def runs(groups: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut groups into runs to be computed in one go: neighbours of few rows together, a larger group alone.

    Groups without rows are left out.
    """
    together: list[tuple[int, int]] = []
    for group in groups:
        if group[1] > MAX_ROWS:
            if together:
                yield together
                together = []
            yield [group]
        elif group[1]:
            together.append(group)
    if together:
        yield together


def apply_experts(x_RD: Tensor, nums_rows: Sequence[int], weights: Sequence[ExpertWeights], out_RD: Tensor) -> None:
    """Write down(silu(gate x) · up x) of each expert's rows."""
    hidden_R2F = x_RD.new_empty(len(x_RD), 2 * weights[0].down_FD.shape[0])
    gate_RF, up_RF = hidden_R2F.chunk(2, dim=-1)
    fused = [expert.gate_up_D2F for expert in weights if expert.gate_up_D2F is not None]
    if len(fused) == len(weights):
        project_groups(x_RD, nums_rows, fused, hidden_R2F)
    else:
        project_groups(x_RD, nums_rows, [expert.gate_DF for expert in weights], gate_RF)
        project_groups(x_RD, nums_rows, [expert.up_DF for expert in weights], up_RF)
    project_groups(swiglu(gate_RF, up_RF), nums_rows, [expert.down_FD for expert in weights], out_RD)


def _moved(weights: ExpertWeights, dtype: torch.dtype, device: torch.device | str) -> ExpertWeights:
    """Return the weights in `dtype` on `device`; gate and up remain views of the one matrix where there is one."""
    moved = {f.name: getattr(weights, f.name) for f in fields(weights)}
    moved = {name: None if t is None else t.to(device=device, dtype=dtype) for name, t in moved.items()}
    if moved["gate_up_D2F"] is not None:
        moved["gate_DF"], moved["up_DF"] = moved["gate_up_D2F"].chunk(2, dim=-1)
    return ExpertWeights(**moved)
