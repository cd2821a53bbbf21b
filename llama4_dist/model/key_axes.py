"""What all layers of one kind share in a step: which keys each row sees, and the masks that say so; knows no pages."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.model.batch import SequenceSpan
from llama4_dist.model.linear import ROW_TILE, padded_rows
from llama4_dist.model.query_runs import QueryRun, decode_groups, padded_keys, query_runs


class KeyAxes:
    """The key axes of a step's rows for one `chunk_size` (None = all keys). Parts are made when first asked for."""

    def __init__(
        self, spans: Sequence[SequenceSpan], chunk_size: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device = device
        self._spans = spans
        self._chunk_size = chunk_size
        self._dtype = dtype

    @cached_property
    def sequences(self) -> NDArray[np.int64]:
        """The index in the step of each row's sequence, [T]."""
        return np.repeat(np.arange(len(self._spans)), [span.num_tokens for span in self._spans])

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """The position of each row, [T]."""
        counts = np.array([span.num_tokens for span in self._spans])
        offsets = np.array([span.num_cached for span in self._spans]) - (np.cumsum(counts) - counts)
        positions: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(offsets, counts)
        return positions

    @cached_property
    def sequence_T(self) -> Tensor:
        """The index in the step of each row's sequence, int32."""
        return self._to_device(self.sequences)

    @cached_property
    def first_key_T(self) -> Tensor:
        """The first position that each row sees, int32; it sees all from there up to itself."""
        if self._chunk_size is None:
            return self._to_device(np.zeros_like(self.positions))
        return self._to_device(self.positions // self._chunk_size * self._chunk_size)

    @cached_property
    def num_keys_T(self) -> Tensor:
        """How many keys each row sees, int32."""
        return self._to_device(self.positions + 1) - self.first_key_T

    @cached_property
    def prefill(self) -> tuple[tuple[QueryRun, Tensor], ...]:
        """The runs of several queries, each with its additive mask [Q, S]."""
        return tuple((run, self._prefill_mask(run)) for run in self._query_runs if run.num_queries > 1)

    @cached_property
    def decode(self) -> tuple[tuple[list[QueryRun], Tensor, Tensor], ...]:
        """The groups of single queries, each with its rows [B] and additive mask [B, 1, 1, S]."""
        groups = decode_groups([run for run in self._query_runs if run.num_queries == 1])
        return tuple(
            (runs, torch.tensor([run.row for run in runs]).to(self.device), self._decode_mask(runs)) for runs in groups
        )

    def keys(self, runs: Sequence[QueryRun]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return sequences [B, 1] and key positions [B, S] of runs that have key axes of one length."""
        sequences = np.array([[run.sequence] for run in runs])
        first_key = np.array([[run.first_key] for run in runs])
        last_key = np.array([[run.num_keys_of_last - 1] for run in runs])
        # Padding repeats the sequence's own last key: what another sequence holds must not reach this one, not even as
        # NaN.
        return sequences, first_key + np.minimum(np.arange(padded_keys(runs[0].num_keys_of_last)), last_key)

    @cached_property
    def _query_runs(self) -> list[QueryRun]:
        return list(query_runs(self._spans, self._chunk_size))

    def _prefill_mask(self, run: QueryRun) -> Tensor:
        num_rows = padded_rows(run.num_queries, ROW_TILE)
        num_keys_Q = torch.arange(run.num_keys, run.num_keys + num_rows).clamp(max=run.num_keys_of_last)
        return self._mask(padded_keys(run.num_keys_of_last), num_keys_Q[:, None])

    def _decode_mask(self, runs: Sequence[QueryRun]) -> Tensor:
        num_keys_B1 = torch.tensor([[run.num_keys] for run in runs])
        return self._mask(padded_keys(runs[0].num_keys), num_keys_B1)[:, None, None, :]

    def _mask(self, num_keys: int, seen: Tensor) -> Tensor:
        """Return 0 where a key is seen and -inf elsewhere."""
        unseen = torch.arange(num_keys) >= seen
        return torch.zeros(1, dtype=self._dtype).masked_fill(unseen, float("-inf")).to(self.device)

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(self.device)
