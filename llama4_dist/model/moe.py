"""The mixture-of-experts layer: route, send rows away, run the shared expert meanwhile, take the outputs in."""

from typing import Any

from torch import Tensor

from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.feed_forward import FeedForward
from llama4_dist.model.reduction import Reduction
from llama4_dist.model.router import Router
from llama4_dist.stations import EXPERT, Stations


class MixtureOfExperts:
    """Source: transformers `Llama4TextMoe`. The routed experts themselves live elsewhere.

    Among ranks every one routes all rows, which gives the same bits everywhere, and sends its own rows away.
    """

    def __init__(
        self, layer: int, router: Router, shared_expert: FeedForward, reduction: Reduction | None = None
    ) -> None:
        self.layer = layer
        self.router = router
        self.shared_expert = shared_expert
        self.reduction = reduction

    def dispatch(self, x_TD: Tensor, num_tokens: int, dispatcher: Dispatcher, microbatch: int) -> Any:
        """Choose experts for the first `num_tokens` rows and send those away; the others are padding and stay here."""
        route = self.router(x_TD)
        rows = (x_TD[:num_tokens], route.experts_TK[:num_tokens], route.scores_TK[:num_tokens])
        if self.reduction is not None:
            return self.reduction.dispatch(dispatcher, self.layer, *rows, microbatch)
        return dispatcher.dispatch(self.layer, *rows, microbatch)

    def combine(
        self, x_TD: Tensor, num_tokens: int, in_flight: Any, dispatcher: Dispatcher, stations: Stations
    ) -> Tensor:
        """Return the layer's output for the first `num_tokens` rows of what `dispatch` was given, without ranks."""
        shared_TD = self.shared_expert(x_TD)[:num_tokens]
        stations.mark(EXPERT)
        return shared_TD + dispatcher.combine(in_flight)

    def add_among_ranks(
        self, x_TD: Tensor, h_TD: Tensor, in_flight: Any, dispatcher: Dispatcher, stations: Stations
    ) -> None:
        """Add the layer's output to the rows `x_TD` [T, D] in place; `h_TD` may have rows of padding more."""
        assert self.reduction is not None, "there is one rank"
        shared_TD = self.shared_expert(h_TD)[: len(x_TD)]
        stations.mark(EXPERT)
        self.reduction.add_with_routed(x_TD, shared_TD, self.reduction.combine(dispatcher, in_flight))
