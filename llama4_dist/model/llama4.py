"""The Llama 4 text decoder: one step of packed tokens in, logits out. Routed experts are reached by a dispatcher.

The whole model is the stage that is both first and last, without ranks to share its layers with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_dist.checkpoint.names import EMBEDDING, LM_HEAD
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.model.attention import Attention
from llama4_dist.model.attention_plan import StepPlan, plan_step
from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.feed_forward import FeedForward
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.linear import linear
from llama4_dist.model.microbatches import run_layers, split_spans
from llama4_dist.model.moe import MixtureOfExperts
from llama4_dist.model.norm import rms_norm
from llama4_dist.model.reduction import Reduction, embed
from llama4_dist.model.rope import frequencies
from llama4_dist.model.router import Router
from llama4_dist.model.weights import Weights
from llama4_dist.stations import ATTENTION, COMBINE, OTHER, ROUTE, NotMeasured, Stations


@dataclass(slots=True, eq=False)
class Part:
    """Some tokens of a step on their way through the layers; the residual stream [T, D] is filled up to a tile."""

    x_TD: Tensor
    plan: StepPlan
    cache: KVCache
    dispatcher: Dispatcher
    stations: Stations
    microbatch: int
    h_TD: Tensor  # what the layer's experts read
    in_flight: Any = None


class DecoderLayer:
    """x += attention(norm(x)); x += feed_forward(norm(x)). Source: transformers `Llama4TextDecoderLayer`."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, reduction: Reduction | None = None) -> None:
        prefix = f"model.layers.{layer}"
        self.reduction = reduction
        self.eps = config.rms_norm_eps
        self.input_norm_D = weights.tensor(f"{prefix}.input_layernorm.weight")
        self.attention = Attention(config, layer, weights)
        self.post_attention_norm_D = weights.tensor(f"{prefix}.post_attention_layernorm.weight")
        self.feed_forward: MixtureOfExperts | FeedForward
        if config.moe_layers[layer]:
            router = Router(weights.tensor(f"{prefix}.feed_forward.router.weight"), config.experts_per_token)
            shared_expert = FeedForward(f"{prefix}.feed_forward.shared_expert", weights)
            self.feed_forward = MixtureOfExperts(layer, router, shared_expert, reduction)
        else:
            self.feed_forward = FeedForward(f"{prefix}.feed_forward", weights)

    def begin(self, part: Part) -> None:
        """Run attention, then send rows to the experts, or run the dense network."""
        x_TD, plan = part.x_TD, part.plan
        attended_TD = self.attention(rms_norm(x_TD, self.input_norm_D, self.eps), plan, part.cache)
        self._add(x_TD, attended_TD, plan.num_tokens)
        h_TD = rms_norm(x_TD, self.post_attention_norm_D, self.eps)
        part.stations.mark(ATTENTION)
        if isinstance(self.feed_forward, MixtureOfExperts):
            part.in_flight = self.feed_forward.dispatch(h_TD, plan.num_tokens, part.dispatcher, part.microbatch)
            part.h_TD = h_TD
            part.stations.mark(ROUTE)
        else:
            self._add(x_TD, self.feed_forward(h_TD), plan.num_tokens)
            part.stations.mark(OTHER)

    def finish(self, part: Part) -> None:
        """Run the shared expert and take the routed ones' answers in."""
        if isinstance(self.feed_forward, MixtureOfExperts):
            x_TD, waited_for = part.x_TD[: part.plan.num_tokens], (part.in_flight, part.dispatcher, part.stations)
            if self.reduction is None:
                x_TD += self.feed_forward.combine(part.h_TD, part.plan.num_tokens, *waited_for)
            else:
                self.feed_forward.add_among_ranks(x_TD, part.h_TD, *waited_for)
            part.stations.mark(COMBINE)

    def _add(self, x_TD: Tensor, y_TD: Tensor, num_tokens: int) -> None:
        """Add a block's output, or this rank's summand of it, to the residual stream."""
        if self.reduction is None:
            x_TD += y_TD
        else:
            self.reduction.add(x_TD[:num_tokens], y_TD[:num_tokens])


class Llama4:
    """The decoder without its routed experts, or a member's share of it (`weights.share`).

    `forward` keeps nothing between calls except in the cache it is given.
    """

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
        self.dtype, self.device = weights.dtype, weights.device
        if share.is_first:
            self.embedding_VD = weights.tensor(EMBEDDING)
        self.layers: list[DecoderLayer] = []
        for layer in share.layers:
            self.layers.append(DecoderLayer(config, layer, weights, reduction))
            if progress:
                progress(len(self.layers), len(share.layers))
        if share.is_last:
            self.norm_D = weights.tensor("model.norm.weight")
            tied = config.tie_word_embeddings
            self.head_VD = weights.tensor(EMBEDDING) if tied else weights.linear(LM_HEAD)
        self.num_parameters = weights.num_parameters

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Llama4":
        """Read all weights but the routed experts'; `progress` is told (layers read, layers in all)."""
        weights = Weights(checkpoint, dtype=dtype, device=torch.device(device))
        return cls(checkpoint.config, weights, progress=progress)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher, rows_TD: Tensor | None = None) -> Tensor:
        """Run one step and return the float32 logits [P, V] of `batch.logit_rows`.

        A rank's logits are those of its vocabulary. A stage that is not the first is given the rows of the one before;
        one that is not the last returns rows [T, D], in the compute dtype.
        """
        dispatcher.begin_step(batch.step)
        if rows_TD is None:
            token_ids_T = batch.token_ids_T.to(self.device)
            rows_TD = embed(self.embedding_VD, token_ids_T, self.share.vocabulary, self.reduction)
        spans_of_parts = split_spans(batch.spans, batch.num_microbatches)
        rows_of_parts = torch.split(rows_TD, [sum(span.num_tokens for span in spans) for spans in spans_of_parts])
        parts = [
            self._part(spans, own_TD, number, cache, dispatcher)
            for number, (spans, own_TD) in enumerate(
                zip(spans_of_parts, rows_of_parts, strict=True), start=batch.first_microbatch
            )
        ]
        self.stations.mark(OTHER)
        run_layers(self.layers, parts)
        x_TD = torch.cat([part.x_TD[: part.plan.num_tokens] for part in parts]) if len(parts) > 1 else parts[0].x_TD
        if not self.share.is_last:
            return x_TD[: len(rows_TD)]
        if not batch.logit_rows:
            return x_TD.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        x_PD = rms_norm(x_TD[list(batch.logit_rows)], self.norm_D, self.config.rms_norm_eps)
        return linear(x_PD, self.head_VD).float()

    def _part(
        self,
        spans: Sequence[SequenceSpan],
        rows_TD: Tensor,
        microbatch: int,
        cache: KVCache,
        dispatcher: Dispatcher,
    ) -> Part:
        plan = plan_step(
            spans,
            floor_scale=self.config.floor_scale,
            attn_scale=self.config.attn_scale,
            frequencies_C=self.frequencies_C,
            layout=cache.layout,
            block_size=cache.block_size,
            dtype=self.dtype,
            device=self.device,
        )
        # All row-wise work runs on a tile of rows; the rows past `num_tokens` are thrown away at the end.
        num_padding = plan.rotation_T1C.shape[0] - plan.num_tokens
        x_TD = F.pad(rows_TD, (0, 0, 0, num_padding))
        return Part(x_TD, plan, cache, dispatcher, self.stations, microbatch, h_TD=x_TD)
