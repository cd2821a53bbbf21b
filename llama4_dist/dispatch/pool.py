"""Rows of several frames of one layer, brought together so that each expert runs once. Knows no links."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama4_dist.dispatch.layout import Groups


class Run(NamedTuple):
    """`num_rows` rows of one expert: from `source` on in frame `frame`, from `target` on in the pool."""

    frame: int
    source: int
    target: int
    num_rows: int


class PoolPlan(NamedTuple):
    groups: Groups
    runs: tuple[Run, ...]  # ascending by target
    num_rows: int


def plan_pool(groups_by_frame: Sequence[Groups]) -> PoolPlan:
    """Merge the groups of several frames: ascending by expert, within an expert in the order of the frames."""
    runs_by_expert: dict[int, list[tuple[int, int, int]]] = {}
    for frame, groups in enumerate(groups_by_frame):
        source = 0
        for expert, count in groups:
            runs_by_expert.setdefault(expert, []).append((frame, source, count))
            source += count
    runs: list[Run] = []
    merged: list[tuple[int, int]] = []
    target = 0
    for expert in sorted(runs_by_expert):
        start = target
        for frame, source, count in runs_by_expert[expert]:
            runs.append(Run(frame, source, target, count))
            target += count
        merged.append((expert, target - start))
    return PoolPlan(tuple(merged), tuple(runs), target)


def gather(plan: PoolPlan, rows_by_frame: Sequence[Tensor], pool_RD: Tensor) -> None:
    """Copy the frames' rows into the pool."""
    parts = [rows_by_frame[run.frame][run.source : run.source + run.num_rows] for run in plan.runs]
    torch.cat(parts, out=pool_RD)


def scatter(plan: PoolPlan, pool_RD: Tensor, rows_by_frame: Sequence[Tensor]) -> None:
    """Copy the pool's rows back to the frames they came from."""
    for run in plan.runs:
        rows_by_frame[run.frame][run.source : run.source + run.num_rows] = pool_RD[
            run.target : run.target + run.num_rows
        ]
