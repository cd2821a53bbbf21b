"""Repetition, frequency and presence penalties on logits; formulas as in vLLM and, for repetition, arXiv 1909.05858."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_dist.engine.sequence import SequenceState


def needs_penalties(sequence: SequenceState) -> bool:
    """Return whether any of the three penalties is on."""
    s = sequence.sampling
    return s.repetition_penalty != 1.0 or s.frequency_penalty != 0.0 or s.presence_penalty != 0.0


def apply_penalties(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> None:
    """Change `logits_PV` in place; row i belongs to sequences[i].

    Repetition counts prompt and output and scales a logit away from being chosen; frequency and presence count the
    output alone and subtract.
    """
    _repetition(logits_PV, sequences)
    _frequency_and_presence(logits_PV, sequences)


def _repetition(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> None:
    for row, sequence in enumerate(sequences):
        penalty = sequence.sampling.repetition_penalty
        if penalty == 1.0:
            continue
        seen = torch.tensor(sorted(set(sequence.tokens)), dtype=torch.int64, device=logits_PV.device)
        x_N = logits_PV[row, seen]
        logits_PV[row, seen] = torch.where(x_N > 0, x_N / penalty, x_N * penalty)


def _frequency_and_presence(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> None:
    rows: list[int] = []
    columns: list[int] = []
    amounts: list[float] = []
    for row, sequence in enumerate(sequences):
        s = sequence.sampling
        if s.frequency_penalty == 0.0 and s.presence_penalty == 0.0:
            continue
        for token_id, count in sequence.output_counts.items():
            rows.append(row)
            columns.append(token_id)
            amounts.append(s.presence_penalty + s.frequency_penalty * count)
    if rows:
        # (row, column) pairs are distinct, so the scattered subtraction has one writer per element.
        logits_PV[rows, columns] -= torch.tensor(amounts, dtype=logits_PV.dtype, device=logits_PV.device)
