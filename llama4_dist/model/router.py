"""Chooses the experts of each token and the score each gets."""

from dataclasses import dataclass

from torch import Tensor

from llama4_dist.model.activation import sigmoid
from llama4_dist.model.linear import linear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Route:
    """Per token its K experts, likeliest first, and their scores."""

    experts_TK: Tensor  # int64
    scores_TK: Tensor


class Router:
    """Source: transformers `Llama4Router`."""

    def __init__(self, weight_ED: Tensor, experts_per_token: int) -> None:
        self.weight_ED = weight_ED
        self.experts_per_token = experts_per_token

    def __call__(self, x_TD: Tensor) -> Route:
        logits_TE = linear(x_TD, self.weight_ED)
        # A stable sort gives equal logits to the lowest index, where topk promises no order.
        sorted_TE, experts_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
        top_TK, experts_TK = sorted_TE[:, : self.experts_per_token], experts_TE[:, : self.experts_per_token]
        return Route(experts_TK=experts_TK, scores_TK=scores_of(top_TK))


def scores_of(logits_TK: Tensor) -> Tensor:
    """Return each logit's own sigmoid: no softmax, no renormalisation over the K."""
    return sigmoid(logits_TK).to(logits_TK.dtype)
