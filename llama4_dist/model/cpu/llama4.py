"""The decoder without its routed experts, on a processor. Activations are float32, rows of the given dtype."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
from llama4_dist.model.cpu.workspace import Workspace
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.microbatches import run_layers, split_spans
from llama4_dist.model.reduction import Reduction, embed
from llama4_dist.model.rope import frequencies
from llama4_dist.model.weights import Weights
from llama4_dist.stations import ATTENTION, OTHER, ROUTE, NotMeasured, Stations


@dataclass(slots=True, eq=False)
class Part:
    """Some tokens of a step on their way through the layers; the residual stream is float32 [T, D]."""

    x_TD: Tensor
    plan: CpuPlan
    work: Workspace
    cache: KVCache
    dispatcher: Dispatcher
    stations: Stations
    microbatch: int
    in_flight: Any = None


class DecoderLayer:
    """x += attention(norm(x)); x += feed_forward(norm(x)), in place. Source: transformers `Llama4TextDecoderLayer`."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, reduction: Reduction | None = None) -> None:
        self.attention = Attention(config, layer, weights)
        self.reduction = reduction
        self.feed_forward: MixtureOfExperts | DenseFeedForward
        if config.moe_layers[layer]:
            self.feed_forward = MixtureOfExperts(config, layer, weights, reduction)
        else:
            self.feed_forward = DenseFeedForward(config, layer, weights, reduction)

    def begin(self, part: Part) -> None:
        """Run attention, then send rows to the experts, or run the dense network."""
        if self.reduction is None:
            self.attention(part.x_TD, part.plan, part.cache, part.x_TD)
        else:
            summand_TD = part.work.shared_TD.zero_()  # nothing is in it before the experts' half
            self.attention(part.x_TD, part.plan, part.cache, summand_TD)
            self.reduction.add(part.x_TD, summand_TD)
        part.stations.mark(ATTENTION)
        if isinstance(self.feed_forward, MixtureOfExperts):
            part.in_flight = self.feed_forward.dispatch(part.x_TD, part.work, part.dispatcher, part.microbatch)
            part.stations.mark(ROUTE)
        else:
            self.feed_forward(part.x_TD)
            part.stations.mark(OTHER)

    def finish(self, part: Part) -> None:
        """Run the shared expert and take the routed ones' answers in."""
        if isinstance(self.feed_forward, MixtureOfExperts):
            self.feed_forward.combine(part.x_TD, part.work, part.in_flight, part.dispatcher, part.stations)


class DenseFeedForward:
    """x += network(norm(x)) of a layer without experts."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, reduction: Reduction | None = None) -> None:
        self._eps = config.rms_norm_eps
        self._reduction = reduction
        self._norm_D = weights.tensor(f"model.layers.{layer}.post_attention_layernorm.weight").float()
        self._network = FeedForward(f"model.layers.{layer}.feed_forward", weights)

    def __call__(self, x_TD: Tensor) -> None:
        out_TD = torch.empty_like(x_TD)
        self._network(norm(x_TD, self._norm_D, self._eps), out_TD)
        if self._reduction is None:
            x_TD += out_TD
        else:
            self._reduction.add(x_TD, out_TD)


class CpuLlama4:
    """`model.llama4.Llama4` by native passes; it needs float32 or bfloat16 weights and a compiler."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        reduction: Reduction | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`config` is the whole model's; `reduction` is needed where a stage has several ranks."""
        self.share = share = weights.share
        self.config = config = share.local(config)
        self.stations: Stations = NotMeasured()  # the engine gives it its own
        self.reduction = reduction
        self.frequencies_C = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        if share.is_first:
            self.embedding_VD = weights.tensor(EMBEDDING)
        self.layers: list[DecoderLayer] = []
        for layer in share.layers:
            self.layers.append(DecoderLayer(config, layer, weights, reduction))
            if progress:
                progress(len(self.layers), len(share.layers))
        if share.is_last:
            self.norm_D = weights.tensor("model.norm.weight").float()
            self.head = read_linear(weights, EMBEDDING if config.tie_word_embeddings else LM_HEAD)
        self.num_parameters = weights.num_parameters
        self._work: dict[int, Workspace] = {}

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher, rows_TD: Tensor | None = None) -> Tensor:
        """Run one step and return the float32 logits [P, V] of `batch.logit_rows`.

        A rank's logits are those of its vocabulary. A stage that is not the first is given the rows of the one before
        and overwrites them; one that is not the last returns rows [T, D]. Rows are float32.
        """
        dispatcher.begin_step(batch.step)
        x_TD = self._embed(batch.token_ids_T) if rows_TD is None else rows_TD
        parts: list[Part] = []
        first_row = 0
        for index, spans in enumerate(split_spans(batch.spans, batch.num_microbatches)):
            plan = plan_step(
                spans,
                config=self.config,
                frequencies_C=self.frequencies_C,
                layout=cache.layout,
                block_size=cache.block_size,
            )
            own_TD = x_TD[first_row : first_row + plan.num_tokens]
            first_row += plan.num_tokens
            work = self._workspace(index, plan.num_tokens)
            number = batch.first_microbatch + index
            parts.append(Part(own_TD, plan, work, cache, dispatcher, self.stations, microbatch=number))
        self.stations.mark(OTHER)
        run_layers(self.layers, parts)
        return self._logits(x_TD, batch.logit_rows) if self.share.is_last else x_TD

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        return embed(self.embedding_VD, token_ids_T, self.share.vocabulary, self.reduction).float()

    def _logits(self, x_TD: Tensor, logit_rows: Sequence[int]) -> Tensor:
        if not logit_rows:
            return x_TD.new_empty((0, self.config.vocab_size))
        x_PD = x_TD if len(logit_rows) == len(x_TD) else x_TD[list(logit_rows)]
        return self.head(norm(x_PD, self.norm_D, self.config.rms_norm_eps))

    def _workspace(self, microbatch: int, num_tokens: int) -> Workspace:
        """Return that of the last step where it fits: decode repeats its size."""
        work = self._work.get(microbatch)
        if work is None or work.num_tokens != num_tokens:
            work = Workspace(num_tokens, self.config.hidden_size, self.config.experts_per_token)
            self._work[microbatch] = work
        return work
