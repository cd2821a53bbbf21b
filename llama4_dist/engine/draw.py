"""Draws one token per row from temperature, min_p, top_k and top_p; a draw depends on its key alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama4_dist.engine.sequence import SequenceState
from llama4_dist.engine.truncation import truncate

GREEDY_BELOW = 1e-5  # vLLM's bound: a smaller temperature would overflow the division and means argmax
_TILE_ELEMENTS = 1 << 21  # float64 working set of a tile of rows: 16 MiB per temporary


def uniform(seed: int, position: int, sequence_index: int) -> float:
    """Return a number in [0, 1) fixed by its arguments: 53 bits of Philox4x64-10 (Salmon et al., SC 2011)."""
    # Typed arrays: a plain list would pass through float64 and lose the low bits of a large seed.
    key = np.array([seed, sequence_index], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=np.array([position, 0, 0, 0], dtype=np.uint64)).random_raw()
    return float(int(raw) >> 11) * 2.0**-53


def draw(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> list[int]:
    """Return one drawn token id per row; every row's temperature is at least GREEDY_BELOW."""
    rows_per_tile = max(1, _TILE_ELEMENTS // logits_PV.shape[1])
    token_ids: list[int] = []
    for start in range(0, len(sequences), rows_per_tile):
        tile = sequences[start : start + rows_per_tile]
        token_ids += _draw_tile(logits_PV[start : start + len(tile)], tile)
    return token_ids


def _draw_tile(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> list[int]:
    p_PV = kept_probabilities(logits_PV, sequences)
    keys = [(s.seed, len(s.tokens), s.request.sequence_index) for s in sequences]
    uniform_P1 = torch.tensor([uniform(*key) for key in keys], dtype=torch.float64, device=p_PV.device)[:, None]
    # Inverse CDF in token-id order: unlike an order by probability it does not jump when two near-equal logits swap.
    cdf_PV = p_PV.cumsum(dim=1)
    # u <= 1 - 2^-53 makes u * total at least half a rounding step smaller than the total, hence some entry is larger.
    return torch.searchsorted(cdf_PV, uniform_P1 * cdf_PV[:, -1:], right=True)[:, 0].tolist()


def kept_probabilities(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> Tensor:
    """Return float64 probabilities after temperature, min_p, top_k, top_p in vLLM's order; dropped tokens are 0."""
    samplings = [s.sampling for s in sequences]
    temperature_P1 = _column([s.temperature for s in samplings], logits_PV)
    p_PV = torch.softmax(logits_PV.double() / temperature_P1, dim=1)
    if any(s.min_p > 0.0 for s in samplings):
        floor_P1 = _column([s.min_p for s in samplings], logits_PV) * p_PV.amax(dim=1, keepdim=True)
        p_PV = p_PV.masked_fill(p_PV < floor_P1, 0.0)
    return truncate(p_PV, samplings)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
