"""Opens engines for the commands: in this process, or as a Ray cluster when expert hosts are asked for."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama4_dist.checkpoint.describe import CheckpointSummary, describe
from llama4_dist.checkpoint.generation_file import GenerationDefaults
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.cli.progress import loading_progress
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.port import Engine
from llama4_dist.request import Sampling
from llama4_dist.settings import ServeSettings
from llama4_dist.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


def open_engine(settings: ServeSettings, *, show_progress: bool) -> Engine:
    """Start the engine that the settings describe; it is ready when this returns."""
    options = EngineOptions(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_waiting=settings.max_waiting,
        max_context=settings.max_context,
        model_name=settings.model_name or settings.model.resolve().name,
    )
    with loading_progress(show=show_progress) as advance:
        if settings.experts == 0:
            return build_single_process(
                settings.model,
                dtype=settings.dtype,
                device=settings.device,
                options=options,
                num_threads=settings.num_threads,
                progress=partial(advance, "loading"),
            )
        from cluster.ray_engine import RayEngine

        return RayEngine(
            settings.model,
            num_expert_hosts=settings.experts,
            num_attention_workers=settings.attention,
            dtype=settings.dtype,
            device=settings.device,
            options=options,
            ray_address=settings.ray_address,
            num_threads=settings.num_threads,
            progress=lambda load: advance(f"loading {load.worker}", load.done, load.total),
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


def sampling_defaults(generation: GenerationDefaults) -> Sampling:
    """The checkpoint's own way to sample, where it says one."""
    if generation.do_sample is False:
        return Sampling(temperature=0.0)
    temperature = 1.0 if generation.temperature is None else generation.temperature
    return Sampling(temperature=temperature, top_p=1.0 if generation.top_p is None else generation.top_p)
