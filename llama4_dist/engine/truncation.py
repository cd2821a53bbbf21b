"""Keeps the likeliest tokens of each row by top_k and top_p; arithmetic on probabilities, no randomness."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_dist.request import Sampling

NUM_CANDIDATES = 1024  # sorting Llama 4's vocabulary costs 30 ms a row on a CPU, finding its best 1024 costs 1 ms


def truncate(p_PV: Tensor, samplings: Sequence[Sampling], *, num_candidates: int = NUM_CANDIDATES) -> Tensor:
    """Return `p_PV` (float64) with every dropped token at 0; the rows need not sum to 1.

    Ties at a cut keep the lower token id. top_p follows Meta's rule: going down the sorted tokens, one is kept while
    the mass before it, as a share of what top_k left, is at most p.
    """
    rows = [row for row, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1.0]
    while rows:
        num_candidates = min(num_candidates, p_PV.shape[1])
        kept_PV, is_exact = _cut(p_PV[rows], [samplings[row] for row in rows], num_candidates)
        done = [row for row, exact in zip(rows, is_exact, strict=True) if exact]
        p_PV = p_PV.index_copy(0, torch.tensor(done, dtype=torch.int64, device=p_PV.device), kept_PV[is_exact])
        # Whether a row needs all tokens sorted depends on that row alone, hence so does its result.
        rows = [row for row, exact in zip(rows, is_exact, strict=True) if not exact]
        num_candidates = p_PV.shape[1]
    return p_PV


def _cut(p_PV: Tensor, samplings: Sequence[Sampling], num_candidates: int) -> tuple[Tensor, list[bool]]:
    """Cut each row among its likeliest tokens; say for which rows the cut is the one among all tokens."""
    top_k_P1 = _column([s.top_k if s.top_k > 0 else math.inf for s in samplings], p_PV)
    top_p_P1 = _column([s.top_p if s.top_p < 1.0 else math.inf for s in samplings], p_PV)
    values_PN, token_ids_PN = _sorted_candidates(p_PV, num_candidates)
    cumulative_PN = values_PN.cumsum(dim=1)
    last_P1 = top_k_P1.clamp(max=num_candidates).long() - 1
    mass_P1 = torch.where(top_k_P1.isinf(), p_PV.sum(dim=1, keepdim=True), cumulative_PN.gather(1, last_P1))
    is_kept_PN = (torch.arange(num_candidates, device=p_PV.device) < top_k_P1) & (
        cumulative_PN - values_PN <= top_p_P1 * mass_P1
    )
    kept_PV = torch.zeros_like(p_PV).scatter_(1, token_ids_PN, values_PN.masked_fill(~is_kept_PN, 0.0))
    # A token outside the candidates is no likelier than the last of them; if the last one kept is likelier still, the
    # candidates held everything that counts, all its equals included.
    num_kept_P1 = is_kept_PN.sum(dim=1, keepdim=True)
    is_inside_P1 = values_PN.gather(1, num_kept_P1 - 1) > values_PN[:, -1:]
    is_inside_P1 &= top_k_P1.isinf() | (top_k_P1 <= num_candidates)
    return kept_PV, (is_inside_P1[:, 0] | (num_candidates == p_PV.shape[1])).tolist()


def _sorted_candidates(p_PV: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens by falling probability, equals by rising token id."""
    token_ids_PN = p_PV.topk(num_candidates, dim=1, sorted=False).indices.sort(dim=1).values
    values_PN, order_PN = p_PV.gather(1, token_ids_PN).sort(dim=1, descending=True, stable=True)
    return values_PN, token_ids_PN.gather(1, order_PN)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
