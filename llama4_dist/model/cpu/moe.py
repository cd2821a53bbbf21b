"""The second half of a decoder layer: norm and router as one native pass, rows away, the shared expert meanwhile."""

from ctypes import byref
from typing import Any

from torch import Tensor

from llama4_dist.config import ModelConfig
from llama4_dist.model.cpu.feed_forward import FeedForward
from llama4_dist.model.cpu.panels import NAME_OF, pack
from llama4_dist.model.cpu.workspace import Workspace
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.reduction import Reduction
from llama4_dist.model.weights import Weights
from llama4_dist.native import threads
from llama4_dist.native.bindings import Router, passes
from llama4_dist.stations import COMBINE, EXPERT, Stations


class MixtureOfExperts:
    """x += shared(h) + routed(h), h = norm(x). Source: transformers `Llama4TextMoe`."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, reduction: Reduction | None = None) -> None:
        prefix = f"model.layers.{layer}"
        self._layer = layer
        self._reduction = reduction
        self._shared_expert = FeedForward(f"{prefix}.feed_forward.shared_expert", weights)
        self._norm_D = weights.tensor(f"{prefix}.post_attention_layernorm.weight").float()
        self._router = pack(weights.tensor(f"{prefix}.feed_forward.router.weight"))
        self._dtype = weights.dtype
        self._route = getattr(passes(), f"l4d_route_{NAME_OF[self._dtype]}")
        self._add = {dtype: getattr(passes(), f"l4d_add_outputs_{name}") for dtype, name in NAME_OF.items()}
        self._struct = Router(
            *(config.hidden_size, config.num_experts, config.experts_per_token),
            *(config.rms_norm_eps, self._norm_D.data_ptr(), self._router.address),
        )

    def dispatch(self, x_TD: Tensor, work: Workspace, dispatcher: Dispatcher, microbatch: int = 0) -> Any:
        """Choose experts and send the rows of norm(x) away; returns what `combine` takes."""
        self._route(byref(self._struct), x_TD.data_ptr(), work.num_tokens, *work.routed_to, threads.count())
        rows_TD = work.normed_TD.to(self._dtype)
        rows = (rows_TD, work.experts_TK, work.scores_TK)
        if self._reduction is not None:
            return self._reduction.dispatch(dispatcher, self._layer, *rows, microbatch)
        return dispatcher.dispatch(self._layer, *rows, microbatch)

    def combine(
        self, x_TD: Tensor, work: Workspace, in_flight: Any, dispatcher: Dispatcher, stations: Stations
    ) -> None:
        """Add the shared expert's output and the routed ones to the residual stream in place."""
        self._shared_expert(work.normed_TD, work.shared_TD)
        stations.mark(EXPERT)
        if self._reduction is not None:
            own_RD = self._reduction.combine(dispatcher, in_flight)
            self._reduction.add_with_routed(x_TD, work.shared_TD, own_RD)
            stations.mark(COMBINE)
            return
        routed_TD = dispatcher.combine(in_flight).contiguous()
        assert routed_TD.shape == x_TD.shape, "answers of another number or width"
        shared, routed = work.shared_TD.data_ptr(), routed_TD.data_ptr()
        self._add[routed_TD.dtype](x_TD.data_ptr(), shared, routed, x_TD.numel(), threads.count())
        stations.mark(COMBINE)
