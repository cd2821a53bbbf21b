"""How large the engine may grow; plain numbers, checked once."""

import math
from dataclasses import dataclass

from llama4_dist.dispatch.microbatches import MAX_MICROBATCHES
from llama4_dist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Bounds of one engine. Names are vLLM's where it has one.

    `num_blocks` counts pages: `block_size` positions of one group of layers (`model.kv_layout`). It wins over
    `kv_cache_bytes`; with neither, a share of the memory is taken (`engine.kv_sizing`).
    `enable_prefix_caching` lets sequences of one tenant share the pages of equal prompt starts (`engine.prefix`).
    `kv_dtype` is what keys and values are stored in (`engine.kv_dtype`); "auto" is what the model computes in.
    `max_decode_slowdown` is by how much prompt tokens may lengthen a step in which others decode.
    `num_microbatches` is in how many parts a step goes through the layers while experts of other processes compute, 1
    or 2; None has it chosen by what steps take (`dispatch.microbatches`).
    `max_logit_rows` bounds the float32 rows of logits a step makes for prompt log-probabilities or scoring: a row of
    Llama 4's vocabulary is 0.8 MB. `max_score_bytes` bounds the logits that one call of `score` returns.
    `expert_timeout_s` is how long requests wait for an expert that no host serves before they fail as retriable.
    `debug_invariants` checks the conservation of pages after every step. `model_name` is what clients call the
    model: the checkpoint's folder name, if left out.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    kv_dtype: str = "auto"
    max_decode_slowdown: float = 2.0
    num_microbatches: int | None = None
    max_waiting: int = 1024
    max_context: int | None = None
    max_logit_rows: int = 256
    max_score_bytes: int = 4 << 30
    expert_timeout_s: float = 30.0
    model_name: str | None = None
    debug_invariants: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "max_waiting",
            "max_logit_rows",
            "max_score_bytes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_blocks", "kv_cache_bytes", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1, or left out for the default")
        if not 0 <= self.expert_timeout_s < math.inf:
            raise ConfigError(f"expert_timeout_s={self.expert_timeout_s} must be 0 or more seconds")
        if not self.max_decode_slowdown >= 1.0:
            raise ConfigError(f"max_decode_slowdown={self.max_decode_slowdown} must be 1 or more; inf is no bound")
        if self.num_microbatches not in (None, 1, MAX_MICROBATCHES):
            raise ConfigError(f"num_microbatches={self.num_microbatches} must be 1 or 2, or left out to be chosen")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} exceeds max_num_batched_tokens={self.max_num_batched_tokens}: "
                "every running sequence needs one token per step; raise the token budget"
            )
