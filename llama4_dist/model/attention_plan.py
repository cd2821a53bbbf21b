"""Decides, once per step, who attends to what: positions, cache slots, masks, rotation. Knows no weights and no values.

Which queries share an attention call is decided in `query_runs`; what the layers of a kind have in common is made once,
and for each group of layers only the places of its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.model.batch import SequenceSpan
from llama4_dist.model.key_axes import KeyAxes
from llama4_dist.model.kv_layout import KVLayout
from llama4_dist.model.linear import padded_rows
from llama4_dist.model.query_runs import QueryRun
from llama4_dist.model.rope import query_temperature, rotation_table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillAttention:
    """Several queries of one sequence: rows [start, stop) of the step, the slots of their keys, an additive mask."""

    start: int
    stop: int
    slots_1S: Tensor
    mask_QS: Tensor  # Q is padded to the row tile


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeAttention:
    """Single queries of B sequences with key axes of one length: their rows of the step, slots, additive mask."""

    rows_B: Tensor
    slots_BS: Tensor
    mask_B11S: Tensor


class LayerPlan:
    """The attention of one group of layers. Each part is made when it is first asked for, once a step.

    `pages_BN` are int32 page ids: entry n of row b holds block `first_block_B[b] + n` of the step's sequence b. A row
    ends in repetitions of its last page. `slots_T` are the slots where the step's new keys go. `axes` says, for each
    row of the step, whose it is and which keys it sees; `prefill` and `decode` say the same as gathers and masks.
    """

    def __init__(self, group: int, spans: Sequence[SequenceSpan], axes: KeyAxes, block_size: int) -> None:
        self.axes = axes
        self._runs = [span.pages[group] for span in spans]
        self._block_size = block_size

    @cached_property
    def slots_T(self) -> Tensor:
        return self._to_device(self._slots(self.axes.sequences, self.axes.positions))

    @cached_property
    def pages_BN(self) -> Tensor:
        block_BN = np.minimum(np.arange(self._counts.max()), self._counts[:, None] - 1)
        return self._to_device(self._ids[self._starts[:, None] + block_BN].astype(np.int32))

    @cached_property
    def first_block_B(self) -> Tensor:
        return self._to_device(self._first_blocks.astype(np.int32))

    @cached_property
    def prefill(self) -> tuple[PrefillAttention, ...]:
        return tuple(
            PrefillAttention(
                start=run.row, stop=run.row + run.num_queries, slots_1S=self._key_slots([run]), mask_QS=mask
            )
            for run, mask in self.axes.prefill
        )

    @cached_property
    def decode(self) -> tuple[DecodeAttention, ...]:
        return tuple(
            DecodeAttention(rows_B=rows, slots_BS=self._key_slots(runs), mask_B11S=mask)
            for runs, rows, mask in self.axes.decode
        )

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        """The pages of all sequences, one after the other; sequence b's begin at `_starts[b]`."""
        return np.concatenate([run.ids_N for run in self._runs])

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        return np.array([len(run.ids) for run in self._runs])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        starts: NDArray[np.int64] = np.cumsum(self._counts) - self._counts
        return starts

    @cached_property
    def _first_blocks(self) -> NDArray[np.int64]:
        return np.array([run.first_block for run in self._runs])

    def _key_slots(self, runs: Sequence[QueryRun]) -> Tensor:
        sequences, positions = self.axes.keys(runs)
        return self._to_device(self._slots(sequences, positions))

    def _slots(self, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of positions of sequences, by their index in the step; both broadcast."""
        blocks, offsets = np.divmod(positions, self._block_size)
        pages = self._ids[blocks + (self._starts - self._first_blocks)[sequences]]
        slots: NDArray[np.int64] = pages * self._block_size + offsets
        return slots

    def _to_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.axes.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """What all layers of a step share. Tables over T have a row for each padding row too."""

    num_tokens: int  # without padding rows
    rotation_T1C: Tensor
    temperature_T11: Tensor
    layout: KVLayout
    groups: tuple[LayerPlan, ...]

    def for_layer(self, layer: int) -> LayerPlan:
        """Return the plan of the group that a layer belongs to."""
        return self.groups[self.layout.group_of[layer]]


def plan_step(
    spans: Sequence[SequenceSpan],
    *,
    floor_scale: float,
    attn_scale: float,
    frequencies_C: Tensor,
    layout: KVLayout,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> StepPlan:
    """Return the plan of a step; its masks have `dtype`, its tensors lie on `device`."""
    axes: dict[int | None, KeyAxes] = {}
    for group in layout.groups:
        if group.chunk_size not in axes:
            axes[group.chunk_size] = KeyAxes(spans, group.chunk_size, dtype, device)
    positions = next(iter(axes.values())).positions
    num_tokens = len(positions)
    positions_T = torch.from_numpy(np.pad(positions, (0, padded_rows(num_tokens) - num_tokens)))
    temperature_T = query_temperature(positions_T, floor_scale, attn_scale)
    return StepPlan(
        num_tokens=num_tokens,
        rotation_T1C=rotation_table(positions_T, frequencies_C).to(device),
        temperature_T11=temperature_T[:, None, None].to(device),
        layout=layout,
        groups=tuple(
            LayerPlan(number, spans, axes[group.chunk_size], block_size) for number, group in enumerate(layout.groups)
        ),
    )
