"""Counts a model's parameters and the bytes of its KV cache, layer by layer; knows no layout."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from llama4_dist.checkpoint.names import num_expert_parameters
from llama4_dist.config import ModelConfig
from llama4_dist.model.kv_layout import sequence_bytes

KV_BLOCK = 16  # positions of a page; the engine's default


@dataclass(frozen=True, kw_only=True)  # without slots, because what a search asks ten thousand times is kept
class Geometry:
    """The numbers that the formulae ask for. Letters in comments are the formulae's symbols."""

    config: ModelConfig

    @cached_property
    def attention_parameters(self) -> int:
        """P_a: query, key, value and output projections of one layer."""
        config = self.config
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return config.hidden_size * (2 * heads + 2 * kv_heads)

    @cached_property
    def expert_parameters(self) -> int:
        """P_e: one routed expert of one layer, and the shared one."""
        return num_expert_parameters(self.config)

    @cached_property
    def dense_parameters(self) -> int:
        """The feed-forward network of one dense layer."""
        return 3 * self.config.hidden_size * self.config.dense_width

    @cached_property
    def head_parameters(self) -> int:
        """The output head; the embedding has as many."""
        return self.config.vocab_size * self.config.hidden_size

    @cached_property
    def num_moe_layers(self) -> int:
        return len(self.config.moe_layer_ids)

    @cached_property
    def num_dense_layers(self) -> int:
        return self.config.num_layers - self.num_moe_layers

    @cached_property
    def experts_parameters(self) -> int:
        """All routed experts of all layers."""
        return self.config.num_experts * self.num_moe_layers * self.expert_parameters

    @cached_property
    def trunk_parameters(self) -> int:
        """Everything else: attention, shared experts, dense layers, embedding and head. Norms are left out."""
        layers = self.config.num_layers * self.attention_parameters + self.num_dense_layers * self.dense_parameters
        heads = self.head_parameters * (1 if self.config.tie_word_embeddings else 2)
        return layers + self.num_moe_layers * (self.expert_parameters + self._router) + heads

    @cached_property
    def total_parameters(self) -> int:
        return self.trunk_parameters + self.experts_parameters

    @cached_property
    def active_parameters(self) -> int:
        """What one token is multiplied by; the embedding is looked up, not multiplied by."""
        routed = self.num_moe_layers * self.config.experts_per_token * self.expert_parameters
        looked_up = 0 if self.config.tie_word_embeddings else self.head_parameters
        return self.trunk_parameters + routed - looked_up

    @cached_property
    def _router(self) -> int:
        return self.config.num_experts * self.config.hidden_size

    @cached_property
    def chunked_share(self) -> float:
        """The share of layers that attend to a chunk only."""
        return sum(self.config.chunked_layers) / self.config.num_layers

    def keys_seen(self, context: float) -> float:
        """ctx_eff: the mean over layers of the positions that a token at the end of `context` attends to.

        The formula takes a chunked layer as full, min(context, chunk): the most that it is.
        """
        chunk, chunked = self.config.chunk_size, self.chunked_share
        return context if chunk is None else chunked * min(context, chunk) + (1 - chunked) * context

    def kv_bytes_per_sequence(self, context: int, kv_dtype_bytes: int) -> int:
        """Return what a sequence of `context` tokens holds in all layers; chunked layers keep a chunk."""
        return _sequence_bytes(self.config, context, kv_dtype_bytes)


@lru_cache(maxsize=4096)
def _sequence_bytes(config: ModelConfig, context: int, kv_dtype_bytes: int) -> int:
    return sequence_bytes(config, context, block_size=KV_BLOCK, dtype_bytes=kv_dtype_bytes)
