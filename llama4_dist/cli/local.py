"""What the commands need of a checkpoint: an engine by the settings, and the text side of a gateway."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_dist.checkpoint.describe import CheckpointSummary, describe
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.port import Engine
from llama4_dist.llm.api import sampling_defaults
from llama4_dist.llm.open_engine import open_engine, shown
from llama4_dist.request import Sampling
from llama4_dist.settings import ServeSettings
from llama4_dist.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


def engine_of(settings: ServeSettings, *, show_progress: bool, **cluster: Any) -> Engine:
    """Start the engine that the settings describe, ready when this returns; `cluster` is more for `RayEngine`."""
    options = EngineOptions(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        kv_dtype=settings.kv_dtype,
        enable_prefix_caching=settings.prefix_caching,
        max_decode_slowdown=settings.max_decode_slowdown,
        num_microbatches=settings.num_microbatches,
        max_waiting=settings.max_waiting,
        max_context=settings.max_context,
        model_name=settings.model_name or settings.model.resolve().name,
        expert_timeout_s=settings.expert_timeout_s,
    )
    if settings.experts:
        cluster |= {
            "num_replicas": settings.replicas,
            "host_capacity_bytes": settings.host_capacity_bytes,
            "pool_window_s": settings.pool_window_s,
            "wire": settings.wire,
            "resume_ttl_s": settings.resume_ttl_s,
            "replay_timeout_s": settings.replay_timeout_s,
            "telemetry": settings.telemetry,
            "start_timeout_s": settings.start_timeout_s,
            "placement_timeout_s": settings.placement_timeout_s,
            "demand_roles": settings.demand_roles,
        }
    with shown(show_progress) as progress:
        return open_engine(
            settings.model,
            num_expert_hosts=settings.experts,
            num_attention_workers=settings.attention,
            options=options,
            ray_address=settings.ray_address,
            progress=progress,
            dtype=settings.dtype,
            weights=settings.weights,
            expert_slices=settings.expert_slices,
            partition=settings.partition,
            expert_memory_bytes=settings.expert_memory_bytes,
            device=settings.device,
            num_threads=settings.num_threads,
            cluster=cluster,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextSide:
    """What a gateway needs of a checkpoint besides an engine."""

    summary: CheckpointSummary
    tokenizer: Tokenizer | None
    sampling: Sampling


def open_text(model: Path) -> TextSide:
    """Check the checkpoint's headers and read its tokenizer and sampling defaults; no weight is read."""
    checkpoint = Checkpoint.open(model)
    try:
        tokenizer = load_tokenizer(model)
        if tokenizer is not None:
            check_vocabulary(tokenizer, checkpoint.config.vocab_size)
        return TextSide(
            summary=describe(checkpoint), tokenizer=tokenizer, sampling=sampling_defaults(checkpoint.generation)
        )
    finally:
        checkpoint.close()
