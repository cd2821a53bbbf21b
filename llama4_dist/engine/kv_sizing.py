"""How many KV blocks an engine gets, and the context they allow; arithmetic on sizes, no tensors."""

from llama4_dist.config import ModelConfig
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.plan import blocks_for
from llama4_dist.errors import ConfigError

MEMORY_SHARE = 0.1


def block_bytes(config: ModelConfig, *, block_size: int, dtype_bytes: int) -> int:
    """Return the bytes of one block: keys and values of every layer."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype_bytes


def max_context(config: ModelConfig, options: EngineOptions) -> int:
    """Return the context before memory is considered."""
    return min(config.max_position_embeddings, options.max_context or config.max_position_embeddings)


def num_blocks(config: ModelConfig, options: EngineOptions, *, dtype_bytes: int, memory_bytes: int) -> int:
    """Return the number of blocks: as asked, else what a tenth of `memory_bytes` holds, never more than can be used."""
    if options.num_blocks is not None:
        return options.num_blocks
    size = block_bytes(config, block_size=options.block_size, dtype_bytes=dtype_bytes)
    budget = int(memory_bytes * MEMORY_SHARE) if options.kv_cache_bytes is None else options.kv_cache_bytes
    if budget < size:
        raise ConfigError(f"kv_cache_bytes={budget} holds no block: one block of this model takes {size} bytes")
    usable = options.max_num_seqs * blocks_for(max_context(config, options), options.block_size)
    return min(budget // size, usable)
