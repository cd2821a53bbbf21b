"""The decoder without its routed experts, on a processor. Activations are float32, rows of the given dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

from llama4_dist.checkpoint.names import EMBEDDING, LM_HEAD
from llama4_dist.config import ModelConfig
from llama4_dist.model.batch import Batch
from llama4_dist.model.cpu.attention import Attention
from llama4_dist.model.cpu.feed_forward import FeedForward
from llama4_dist.model.cpu.linears import read_linear
from llama4_dist.model.cpu.moe import MixtureOfExperts
from llama4_dist.model.cpu.norm import norm
from llama4_dist.model.cpu.plan import CpuPlan, plan_step
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.moe import Dispatcher
from llama4_dist.model.rope import frequencies
from llama4_dist.model.weights import Weights
from llama4_dist.stations import ATTENTION, OTHER, ROUTE, NotMeasured, Stations


class DecoderLayer:
    """x += attention(norm(x)); x += feed_forward(norm(x)). Source: transformers `Llama4TextDecoderLayer`."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        self.attention = Attention(config, layer, weights)
        self.feed_forward: MixtureOfExperts | DenseFeedForward
        if config.moe_layers[layer]:
            self.feed_forward = MixtureOfExperts(config, layer, weights)
        else:
            self.feed_forward = DenseFeedForward(config, layer, weights)

    def __call__(self, x_TD: Tensor, plan: CpuPlan, cache: KVCache, dispatcher: Dispatcher, stations: Stations) -> None:
        """Add the layer's outputs to the residual stream in place."""
        self.attention(x_TD, plan, cache)
        stations.mark(ATTENTION)
        if isinstance(self.feed_forward, MixtureOfExperts):
            normed_TD, in_flight = self.feed_forward.dispatch(x_TD, dispatcher)
            stations.mark(ROUTE)
            self.feed_forward.combine(x_TD, normed_TD, in_flight, dispatcher, stations)
        else:
            self.feed_forward(x_TD)
            stations.mark(OTHER)


class DenseFeedForward:
    """x += network(norm(x)) of a layer without experts."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        self._eps = config.rms_norm_eps
        self._norm_D = weights.tensor(f"model.layers.{layer}.post_attention_layernorm.weight").float()
        self._network = FeedForward(f"model.layers.{layer}.feed_forward", weights)

    def __call__(self, x_TD: Tensor) -> None:
        x_TD += self._network(norm(x_TD, self._norm_D, self._eps))


class CpuLlama4:
    """`model.llama4.Llama4` by native passes; it needs float32 or bfloat16 weights and a compiler."""

    def __init__(
        self, config: ModelConfig, weights: Weights, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.config = config
        self.stations: Stations = NotMeasured()  # the engine gives it its own
        self.frequencies_C = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.embedding_VD = weights.tensor(EMBEDDING)
        self.layers: list[DecoderLayer] = []
        for layer in range(config.num_layers):
            self.layers.append(DecoderLayer(config, layer, weights))
            if progress:
                progress(layer + 1, config.num_layers)
        self.norm_D = weights.tensor("model.norm.weight").float()
        self.head = read_linear(weights, EMBEDDING if config.tie_word_embeddings else LM_HEAD)
        self.num_parameters = weights.num_parameters

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor:
        """Run one step and return the float32 logits [P, V] of `batch.logit_rows`."""
        plan = plan_step(
            batch.spans,
            config=self.config,
            frequencies_C=self.frequencies_C,
            layout=cache.layout,
            block_size=cache.block_size,
        )
        dispatcher.begin_step(batch.step)
        x_TD = self.embedding_VD.index_select(0, batch.token_ids_T).float()
        self.stations.mark(OTHER)
        for layer in self.layers:
            layer(x_TD, plan, cache, dispatcher, self.stations)
        if not batch.logit_rows:
            return x_TD.new_empty((0, self.config.vocab_size))
        x_PD = x_TD if len(batch.logit_rows) == len(x_TD) else x_TD[list(batch.logit_rows)]
        return self.head(norm(x_PD, self.norm_D, self.config.rms_norm_eps))
