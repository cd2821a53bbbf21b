"""The second half of a decoder layer: norm and router as one native pass, rows away, the shared expert meanwhile."""

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from llama4_dist.config import ModelConfig
from llama4_dist.model.cpu.feed_forward import FeedForward
from llama4_dist.model.cpu.panels import NAME_OF, pack
from llama4_dist.model.moe import Dispatcher
from llama4_dist.model.weights import Weights
from llama4_dist.native import threads
from llama4_dist.native.bindings import Router, passes
from llama4_dist.stations import COMBINE, EXPERT, Stations


class MixtureOfExperts:
    """x += shared(h) + routed(h), h = norm(x). Source: transformers `Llama4TextMoe`."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        prefix = f"model.layers.{layer}"
        self._layer = layer
        self._shared_expert = FeedForward(f"{prefix}.feed_forward.shared_expert", weights)
        self._norm_D = weights.tensor(f"{prefix}.post_attention_layernorm.weight").float()
        self._router = pack(weights.tensor(f"{prefix}.feed_forward.router.weight"))
        self._experts_per_token = config.experts_per_token
        self._dtype = weights.dtype
        self._route = getattr(passes(), f"l4d_route_{NAME_OF[self._dtype]}")
        self._struct = Router(
            *(config.hidden_size, config.num_experts, config.experts_per_token),
            *(config.rms_norm_eps, self._norm_D.data_ptr(), self._router.address),
        )

    def dispatch(self, x_TD: Tensor, dispatcher: Dispatcher, microbatch: int = 0) -> tuple[Tensor, Any]:
        """Choose experts and send the rows away; returns norm(x) and what `combine` takes."""
        num_tokens = len(x_TD)
        normed_TD = torch.empty_like(x_TD)
        experts_TK = torch.empty(num_tokens, self._experts_per_token, dtype=torch.int64)
        scores_TK = torch.empty(num_tokens, self._experts_per_token)
        self._route(
            byref(self._struct),
            x_TD.data_ptr(),
            num_tokens,
            normed_TD.data_ptr(),
            experts_TK.data_ptr(),
            scores_TK.data_ptr(),
            threads.count(),
        )
        rows_TD = normed_TD.to(self._dtype)
        return normed_TD, dispatcher.dispatch(self._layer, rows_TD, experts_TK, scores_TK, microbatch)

    def combine(
        self, x_TD: Tensor, normed_TD: Tensor, in_flight: Any, dispatcher: Dispatcher, stations: Stations
    ) -> None:
        """Add the shared expert's output and the routed ones to the residual stream in place."""
        shared_TD = self._shared_expert(normed_TD)
        stations.mark(EXPERT)
        x_TD += shared_TD.add_(dispatcher.combine(in_flight))
        stations.mark(COMBINE)
