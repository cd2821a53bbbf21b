"""The mixture-of-experts layer: route, send rows away, run the shared expert meanwhile, take the outputs in."""

from typing import Any, Protocol

from torch import Tensor

from llama4_dist.model.feed_forward import FeedForward
from llama4_dist.model.router import Router
from llama4_dist.stations import EXPERT, Stations


class Dispatcher(Protocol):
    """What a model asks of whoever reaches the experts; `dispatch.Dispatcher` is one."""

    def begin_step(self, step: int) -> None: ...

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, microbatch: int = 0) -> Any: ...

    def combine(self, in_flight: Any) -> Tensor: ...


class MixtureOfExperts:
    """Source: transformers `Llama4TextMoe`. The routed experts themselves live elsewhere."""

    def __init__(self, layer: int, router: Router, shared_expert: FeedForward) -> None:
        self.layer = layer
        self.router = router
        self.shared_expert = shared_expert

    def dispatch(self, x_TD: Tensor, num_tokens: int, dispatcher: Dispatcher, microbatch: int) -> Any:
        """Choose experts for the first `num_tokens` rows and send those away; the others are padding and stay here."""
        route = self.router(x_TD)
        experts_TK, scores_TK = route.experts_TK[:num_tokens], route.scores_TK[:num_tokens]
        return dispatcher.dispatch(self.layer, x_TD[:num_tokens], experts_TK, scores_TK, microbatch)

    def combine(
        self, x_TD: Tensor, num_tokens: int, in_flight: Any, dispatcher: Dispatcher, stations: Stations
    ) -> Tensor:
        """Return the layer's output for the first `num_tokens` rows of what `dispatch` was given."""
        shared_TD = self.shared_expert(x_TD)[:num_tokens]
        stations.mark(EXPERT)
        return shared_TD + dispatcher.combine(in_flight)
