"""Decides, once per step, who attends to what: positions, cache slots, masks, rotation. Knows no weights and no values.

Which queries share an attention call is decided in `query_runs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_dist.config import ModelConfig
from llama4_dist.model.batch import SequenceSpan
from llama4_dist.model.linear import ROW_TILE, padded_rows
from llama4_dist.model.query_runs import QueryRun, decode_groups, padded_keys, query_runs
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerPlan:
    """The attention of all layers of one kind: where new keys go, and one entry per attention call."""

    slots_T: Tensor
    prefill: tuple[PrefillAttention, ...]
    decode: tuple[DecodeAttention, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """What all layers of a step share. Tables over T have a row for each padding row too."""

    num_tokens: int  # without padding rows
    rotation_T1C: Tensor
    temperature_T11: Tensor
    full: LayerPlan
    chunked: LayerPlan


def plan_step(
    spans: Sequence[SequenceSpan],
    *,
    config: ModelConfig,
    frequencies_C: Tensor,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> StepPlan:
    """Return the plan of a step; its masks have `dtype`, its tensors lie on `device`."""
    num_tokens = sum(span.num_tokens for span in spans)
    positions_T = torch.zeros(padded_rows(num_tokens), dtype=torch.int64)
    positions_T[:num_tokens] = torch.cat([torch.arange(s.num_cached, s.num_cached + s.num_tokens) for s in spans])
    blocks = BlockTable(spans, block_size)
    full = _plan_layers(spans, blocks, positions_T[:num_tokens], None, dtype, device)
    chunked = full
    if any(config.chunked_layers):
        chunked = _plan_layers(spans, blocks, positions_T[:num_tokens], config.chunk_size, dtype, device)
    temperature_T = query_temperature(positions_T, config.floor_scale, config.attn_scale)
    return StepPlan(
        num_tokens=num_tokens,
        rotation_T1C=rotation_table(positions_T, frequencies_C).to(device),
        temperature_T11=temperature_T[:, None, None].to(device),
        full=full,
        chunked=chunked,
    )


class BlockTable:
    """The cache blocks of a step's sequences, to look up slots of many positions at once."""

    def __init__(self, spans: Sequence[SequenceSpan], block_size: int) -> None:
        width = max(len(span.blocks) for span in spans)
        self._blocks_BN = torch.tensor([span.blocks + (0,) * (width - len(span.blocks)) for span in spans])
        self._block_size = block_size

    def slots(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """Return the cache slots of positions of sequences, by their index in the step; both broadcast."""
        blocks = self._blocks_BN[sequences, positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size


def _plan_layers(
    spans: Sequence[SequenceSpan],
    blocks: BlockTable,
    positions_T: Tensor,
    chunk_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerPlan:
    sequence_T = torch.repeat_interleave(torch.tensor([span.num_tokens for span in spans]))
    runs = list(query_runs(spans, chunk_size))
    singles = [run for run in runs if run.num_queries == 1]
    return LayerPlan(
        slots_T=blocks.slots(sequence_T, positions_T).to(device),
        prefill=tuple(_plan_prefill(run, blocks, dtype, device) for run in runs if run.num_queries > 1),
        decode=tuple(_plan_decode(group, blocks, dtype, device) for group in decode_groups(singles)),
    )


def _plan_prefill(run: QueryRun, blocks: BlockTable, dtype: torch.dtype, device: torch.device) -> PrefillAttention:
    num_rows = padded_rows(run.num_queries, ROW_TILE)
    num_keys_Q = torch.arange(run.num_keys, run.num_keys + num_rows).clamp(max=run.num_keys_of_last)
    key_S = torch.arange(padded_keys(run.num_keys_of_last))
    return PrefillAttention(
        start=run.row,
        stop=run.row + run.num_queries,
        slots_1S=_key_slots([run], key_S, blocks).to(device),
        mask_QS=_mask(key_S, num_keys_Q[:, None], dtype).to(device),
    )


def _plan_decode(
    runs: Sequence[QueryRun], blocks: BlockTable, dtype: torch.dtype, device: torch.device
) -> DecodeAttention:
    num_keys_B1 = torch.tensor([[run.num_keys] for run in runs])
    key_S = torch.arange(padded_keys(runs[0].num_keys))
    return DecodeAttention(
        rows_B=torch.tensor([run.row for run in runs]).to(device),
        slots_BS=_key_slots(runs, key_S, blocks).to(device),
        mask_B11S=_mask(key_S, num_keys_B1, dtype)[:, None, None, :].to(device),
    )


def _key_slots(runs: Sequence[QueryRun], key_S: Tensor, blocks: BlockTable) -> Tensor:
    sequence_B1 = torch.tensor([[run.sequence] for run in runs])
    first_key_B1 = torch.tensor([[run.first_key] for run in runs])
    last_key_B1 = torch.tensor([[run.num_keys_of_last - 1] for run in runs])
    # Padding repeats the sequence's own last key: what another sequence holds must not reach this one, not even as NaN.
    return blocks.slots(sequence_B1, first_key_B1 + torch.minimum(key_S, last_key_B1))


def _mask(key_S: Tensor, num_keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a key is seen and -inf elsewhere."""
    return torch.zeros(1, dtype=dtype).masked_fill(key_S >= num_keys, float("-inf"))
