"""Counts what a token must read and multiply: bytes of weights in a decode step, operations of a prefill.

Exact for the geometry, and nothing is taken off for caches or added for copies.
"""

from llama4_dist.config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def attention_weights(config: ModelConfig) -> int:
    """Return the elements of one layer's query, key, value and output projections."""
    return config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)


def feed_forward_weights(config: ModelConfig, layer: int) -> int:
    """Return the elements one token meets in a layer: router, shared expert, its K experts; or the dense network."""
    if not config.moe_layers[layer]:
        return 3 * config.hidden_size * config.dense_width
    expert = 3 * config.hidden_size * config.expert_width
    return config.hidden_size * config.num_experts + (1 + config.experts_per_token) * expert


def norm_weights(config: ModelConfig) -> int:
    """Return the elements of all norms."""
    return config.hidden_size * (2 * config.num_layers + 1)


def layer_weights(config: ModelConfig) -> int:
    """Return the elements of all matrices one token meets in the layers."""
    return sum(attention_weights(config) + feed_forward_weights(config, layer) for layer in range(config.num_layers))


def head_weights(config: ModelConfig) -> int:
    return config.hidden_size * config.vocab_size


def decode_bytes(config: ModelConfig) -> int:
    """Return the bytes of weights that one token's decode step must read, in the checkpoint's dtype.

    All matrices a token meets, the norms, and the whole head. Of the embedding table one row is read, which is left
    out, as are the keys and values: they depend on the context (`kv_bytes`).
    """
    elements = layer_weights(config) + norm_weights(config) + head_weights(config)
    return elements * DTYPE_BYTES[config.dtype]


def kv_bytes(config: ModelConfig, context: int) -> int:
    """Return the bytes of keys and values that one query after `context` positions reads, its own included."""
    row = 2 * config.num_kv_heads * config.head_dim * DTYPE_BYTES[config.dtype]
    return row * sum(keys_seen(config, layer, context) for layer in range(config.num_layers))


def prefill_operations(config: ModelConfig, num_tokens: int) -> int:
    """Return the floating-point operations of a prompt: two for each product and its sum.

    Matrices for every token, the head for the last one only, and in attention q · k and the weighted sum of v over the
    keys that a query really sees. Norms, rotation, softmax and activations are left out.
    """
    matrices = 2 * num_tokens * layer_weights(config) + 2 * head_weights(config)
    pairs = sum(
        keys_seen(config, layer, position) for layer in range(config.num_layers) for position in range(num_tokens)
    )
    return matrices + 4 * config.num_heads * config.head_dim * pairs


def keys_seen(config: ModelConfig, layer: int, position: int) -> int:
    """Return how many keys the query at `position` sees: all up to itself, in a chunked layer those of its chunk."""
    if config.chunked_layers[layer]:
        assert config.chunk_size is not None, "chunked layers have a chunk size"
        return position % config.chunk_size + 1
    return position + 1
