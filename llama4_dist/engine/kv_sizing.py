"""How many KV pages an engine gets, and the context they allow; arithmetic on sizes, no tensors."""

from bisect import bisect_right

from llama4_dist.config import ModelConfig
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.model.kv_layout import KVLayout, layout_of, page_bytes

MEMORY_SHARE = 0.1


def wanted_context(config: ModelConfig, options: EngineOptions) -> int:
    """Return the context before memory is considered."""
    return min(config.max_position_embeddings, options.max_context or config.max_position_embeddings)


def num_pages(
    config: ModelConfig,
    options: EngineOptions,
    *,
    dtype_bytes: int,
    memory_bytes: int,
    layout: KVLayout | None = None,
) -> int:
    """Return the number of pages: as asked, else what a tenth of `memory_bytes` holds, never more than can be used.

    For a group of members pass a member's geometry and layout, and the memory of the one that has least.
    """
    if options.num_blocks is not None:
        return options.num_blocks
    layout = layout or layout_of(config)
    size = page_bytes(config, block_size=options.block_size, dtype_bytes=dtype_bytes, layout=layout)
    budget = int(memory_bytes * MEMORY_SHARE) if options.kv_cache_bytes is None else options.kv_cache_bytes
    at_least = layout.max_pages(1, options.block_size)
    if budget < size * at_least:
        raise ConfigError(
            f"kv_cache_bytes={budget} holds no token: the first takes {at_least} pages of {size} bytes; raise it"
        )
    usable = options.max_num_seqs * layout.max_pages(wanted_context(config, options), options.block_size)
    return min(budget // size, usable)


def longest_sequence(layout: KVLayout, pages: int, block_size: int, *, at_most: int) -> int:
    """Return how many tokens of one sequence `pages` hold, `at_most` that many; 0 if not even one."""
    return bisect_right(range(1, at_most + 1), pages, key=lambda num_tokens: layout.max_pages(num_tokens, block_size))
