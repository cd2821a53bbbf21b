"""The Llama 4 text decoder: one step of packed tokens in, logits out. Routed experts are reached by a dispatcher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.model.attention import Attention
from llama4_dist.model.attention_plan import StepPlan, plan_step
from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.model.feed_forward import FeedForward
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.linear import linear
from llama4_dist.model.microbatches import run_layers, split_spans
from llama4_dist.model.moe import Dispatcher, MixtureOfExperts
from llama4_dist.model.norm import rms_norm
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

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        prefix = f"model.layers.{layer}"
        self.eps = config.rms_norm_eps
        self.input_norm_D = weights.tensor(f"{prefix}.input_layernorm.weight")
        self.attention = Attention(config, layer, weights)
        self.post_attention_norm_D = weights.tensor(f"{prefix}.post_attention_layernorm.weight")
        self.feed_forward: MixtureOfExperts | FeedForward
        if config.moe_layers[layer]:
            router = Router(weights.tensor(f"{prefix}.feed_forward.router.weight"), config.experts_per_token)
            shared_expert = FeedForward(f"{prefix}.feed_forward.shared_expert", weights)
            self.feed_forward = MixtureOfExperts(layer, router, shared_expert)
        else:
            self.feed_forward = FeedForward(f"{prefix}.feed_forward", weights)

    def begin(self, part: Part) -> None:
        """Run attention, then send rows to the experts, or run the dense network."""
        x_TD, plan = part.x_TD, part.plan
        x_TD += self.attention(rms_norm(x_TD, self.input_norm_D, self.eps), plan, part.cache)
        h_TD = rms_norm(x_TD, self.post_attention_norm_D, self.eps)
        part.stations.mark(ATTENTION)
        if isinstance(self.feed_forward, MixtureOfExperts):
            part.in_flight = self.feed_forward.dispatch(h_TD, plan.num_tokens, part.dispatcher, part.microbatch)
            part.h_TD = h_TD
            part.stations.mark(ROUTE)
        else:
            x_TD += self.feed_forward(h_TD)
            part.stations.mark(OTHER)

    def finish(self, part: Part) -> None:
        """Run the shared expert and take the routed ones' answers in."""
        if isinstance(self.feed_forward, MixtureOfExperts):
            num_tokens = part.plan.num_tokens
            part.x_TD[:num_tokens] += self.feed_forward.combine(
                part.h_TD, num_tokens, part.in_flight, part.dispatcher, part.stations
            )
            part.stations.mark(COMBINE)


class Llama4:
    """The decoder without its routed experts. `forward` keeps nothing between calls except in the cache it is given."""

    def __init__(
        self, config: ModelConfig, weights: Weights, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.config = config
        self.stations: Stations = NotMeasured()  # the engine gives it its own
        self.frequencies_C = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.embedding_VD = weights.tensor("model.embed_tokens.weight")
        self.layers: list[DecoderLayer] = []
        for layer in range(config.num_layers):
            self.layers.append(DecoderLayer(config, layer, weights))
            if progress:
                progress(layer + 1, config.num_layers)
        self.norm_D = weights.tensor("model.norm.weight")
        self.head_VD = self.embedding_VD if config.tie_word_embeddings else weights.linear("lm_head.weight")
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
    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor:
        """Run one step and return the float32 logits [P, V] of `batch.logit_rows`."""
        dispatcher.begin_step(batch.step)
        spans_of_parts = split_spans(batch.spans, batch.num_microbatches)
        tokens = torch.split(batch.token_ids_T, [sum(span.num_tokens for span in spans) for spans in spans_of_parts])
        parts = [
            self._part(spans, token_ids_T, index, cache, dispatcher)
            for index, (spans, token_ids_T) in enumerate(zip(spans_of_parts, tokens, strict=True))
        ]
        self.stations.mark(OTHER)
        run_layers(self.layers, parts)
        if not batch.logit_rows:
            return parts[0].x_TD.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        x_TD = torch.cat([part.x_TD[: part.plan.num_tokens] for part in parts]) if len(parts) > 1 else parts[0].x_TD
        x_PD = rms_norm(x_TD[list(batch.logit_rows)], self.norm_D, self.config.rms_norm_eps)
        return linear(x_PD, self.head_VD).float()

    def _part(
        self,
        spans: Sequence[SequenceSpan],
        token_ids_T: Tensor,
        microbatch: int,
        cache: KVCache,
        dispatcher: Dispatcher,
    ) -> Part:
        embedding_VD = self.embedding_VD
        plan = plan_step(
            spans,
            floor_scale=self.config.floor_scale,
            attn_scale=self.config.attn_scale,
            frequencies_C=self.frequencies_C,
            layout=cache.layout,
            block_size=cache.block_size,
            dtype=embedding_VD.dtype,
            device=embedding_VD.device,
        )
        # All row-wise work runs on a tile of rows; the rows past `num_tokens` are thrown away at the end.
        num_padding = plan.rotation_T1C.shape[0] - plan.num_tokens
        x_TD = embedding_VD[F.pad(token_ids_T.to(embedding_VD.device), (0, num_padding))]
        return Part(x_TD, plan, cache, dispatcher, self.stations, microbatch, h_TD=x_TD)
