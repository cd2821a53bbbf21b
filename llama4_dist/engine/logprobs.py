"""Log-probabilities of the model's own distribution: natural logarithm, before temperature, masks and penalties."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_dist.request import PositionLogprobs, TokenLogprob


def position_logprobs(logits_PV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[PositionLogprobs]:
    """Return per row the log-probability and rank of its token, and of the `num_top` likeliest tokens.

    Rank 1 is the likeliest; equal log-probabilities share a rank, and in `top` the lower token id comes first.
    """
    result = []
    # Row by row: a row of Llama 4's vocabulary in float32 is 0.8 MB, and few rows ask for this.
    for logits_V, token_id, count in zip(logits_PV, token_ids, num_top, strict=True):
        logprobs_V = torch.log_softmax(logits_V.float(), dim=0)
        result.append(PositionLogprobs(token=_entry(logprobs_V, token_id), top=_top(logprobs_V, count)))
    return result


def _entry(logprobs_V: Tensor, token_id: int) -> TokenLogprob:
    value = logprobs_V[token_id]
    return TokenLogprob(token_id=token_id, logprob=value.item(), rank=1 + int((logprobs_V > value).sum().item()))


def _top(logprobs_V: Tensor, count: int) -> tuple[TokenLogprob, ...]:
    if count <= 0:
        return ()
    # topk leaves the order of ties open, so take all tokens at or above its last value and order those.
    smallest = logprobs_V.topk(min(count, len(logprobs_V))).values[-1]
    candidates = (logprobs_V >= smallest).nonzero()[:, 0].tolist()
    values = logprobs_V[candidates].tolist()
    best = sorted(zip(values, candidates, strict=True), key=lambda pair: (-pair[0], pair[1]))[:count]
    return tuple(
        TokenLogprob(token_id=token_id, logprob=value, rank=1 + sum(other > value for other, _ in best))
        for value, token_id in best
    )
