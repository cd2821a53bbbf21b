"""Meta's names and shapes of the text model beside Hugging Face's, as pairs of blocks that hold the same numbers; pure.

Source: the model definition and load hooks of `llama_models.llama4` (llama-models 0.3.0). Meta's released files are
pickles, which are never read; here its layout is written and read as safetensors. Read from left to right or from right
to left, the same table converts either way.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llama4_dist.checkpoint.blocks import Block, matrix_block
from llama4_dist.checkpoint.expert_blocks import ExpertRun, Stored, expert_blocks
from llama4_dist.checkpoint.names import EMBEDDING, LM_HEAD, ExpertLayout, Shape
from llama4_dist.checkpoint.text_tensors import META_EMBEDDING
from llama4_dist.config import ModelConfig


class Link(NamedTuple):
    """A block of a Meta tensor that equals a stored block here, turned where `hugging_face.is_transposed`."""

    meta: str
    block: Block
    hugging_face: Stored


def meta_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return every text tensor in Meta's layout; an untied head is part of it."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    shapes: dict[str, Shape] = {META_EMBEDDING: (config.vocab_size, hidden)}
    for layer, is_moe in enumerate(config.moe_layers):
        attention, network = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        shapes[attention + "wqkv.layer_norm_weight"] = (hidden,)
        shapes[attention + "wqkv.weight"] = (heads + 2 * config.num_kv_heads * config.head_dim, hidden)
        shapes[attention + "wo.weight"] = (hidden, heads)
        one = _moe_shapes(config) if is_moe else _dense_shapes(config)
        shapes |= {network + name: shape for name, shape in one.items()}
    return shapes | {"norm.weight": (hidden,), "output.weight": (config.vocab_size, hidden)}


def links(config: ModelConfig, layout: ExpertLayout) -> Iterator[Link]:
    """Yield the pairs of blocks; together they are every element of either side, each once."""
    hidden = config.hidden_size
    vocabulary = matrix_block((config.vocab_size, hidden))
    yield Link(META_EMBEDDING, vocabulary, Stored(EMBEDDING, vocabulary, False))
    for layer, is_moe in enumerate(config.moe_layers):
        yield from _attention(config, layer)
        yield from _moe(config, layout, layer) if is_moe else _dense(config, layer)
    norm = matrix_block((hidden,))
    yield Link("norm.weight", norm, Stored("model.norm.weight", norm, False))
    yield Link("output.weight", vocabulary, Stored(LM_HEAD, vocabulary, False))


def _moe_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, width, experts = config.hidden_size, config.expert_width, config.num_experts
    return {
        "norm.weight": (hidden,),
        "router_DE": (hidden, experts),
        "w_in_shared_FD.weight": (width, hidden),
        "w_swiglu_FD.weight": (width, hidden),
        "w_out_shared_DF.weight": (hidden, width),
        "experts.moe_w_in_eD_F": (experts * hidden, width),
        "experts.moe_w_swiglu_eD_F": (experts * hidden, width),
        "experts.moe_w_out_eF_D": (experts * width, hidden),
    }


def _dense_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, width = config.hidden_size, config.dense_width
    return {
        "mlp.layer_norm_weight": (hidden,),
        "mlp.fc1_weight": (2 * width, hidden),
        "mlp.fc2_weight": (hidden, width),
    }


def _attention(config: ModelConfig, layer: int) -> Iterator[Link]:
    meta, here = f"layers.{layer}.attention.", f"model.layers.{layer}."
    hidden, queries, keys = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    yield _same(meta + "wqkv.layer_norm_weight", here + "input_layernorm.weight", (hidden,))
    yield from _stacked(
        meta + "wqkv.weight",
        [(f"{here}self_attn.{part}_proj.weight", rows) for part, rows in (("q", queries), ("k", keys), ("v", keys))],
        hidden,
    )
    yield _same(meta + "wo.weight", here + "self_attn.o_proj.weight", (hidden, queries))


def _dense(config: ModelConfig, layer: int) -> Iterator[Link]:
    meta, here = f"layers.{layer}.feed_forward.mlp.", f"model.layers.{layer}."
    hidden, width = config.hidden_size, config.dense_width
    yield _same(meta + "layer_norm_weight", here + "post_attention_layernorm.weight", (hidden,))
    gate_up = [(f"{here}feed_forward.{part}_proj.weight", width) for part in ("gate", "up")]
    yield from _stacked(meta + "fc1_weight", gate_up, hidden)
    yield _same(meta + "fc2_weight", here + "feed_forward.down_proj.weight", (hidden, width))


def _moe(config: ModelConfig, layout: ExpertLayout, layer: int) -> Iterator[Link]:
    meta, here = f"layers.{layer}.feed_forward.", f"model.layers.{layer}."
    hidden, width, experts = config.hidden_size, config.expert_width, config.num_experts
    shared = f"{here}feed_forward.shared_expert."
    yield _same(meta + "norm.weight", here + "post_attention_layernorm.weight", (hidden,))
    router = Stored(here + "feed_forward.router.weight", matrix_block((experts, hidden)), True)
    yield Link(meta + "router_DE", matrix_block((hidden, experts)), router)
    yield _same(meta + "w_in_shared_FD.weight", shared + "gate_proj.weight", (width, hidden))
    yield _same(meta + "w_swiglu_FD.weight", shared + "up_proj.weight", (width, hidden))
    yield _same(meta + "w_out_shared_DF.weight", shared + "down_proj.weight", (hidden, width))
    wide, tall = (experts, hidden, width), (experts, width, hidden)
    for expert in range(experts):
        blocks = expert_blocks(config, layout, ExpertRun(layer, expert, 0, width))
        yield Link(meta + "experts.moe_w_in_eD_F", matrix_block(wide, expert), blocks.gate)
        yield Link(meta + "experts.moe_w_swiglu_eD_F", matrix_block(wide, expert), blocks.up)
        yield Link(meta + "experts.moe_w_out_eF_D", matrix_block(tall, expert), blocks.down)


def _same(meta: str, here: str, shape: Shape) -> Link:
    return Link(meta, matrix_block(shape), Stored(here, matrix_block(shape), False))


def _stacked(meta: str, parts: list[tuple[str, int]], columns: int) -> Iterator[Link]:
    """Yield linears of one input that Meta keeps as one, each with its number of rows."""
    first = 0
    for name, rows in parts:
        stop = first + rows
        block = matrix_block((stop, columns), rows=range(first, stop))
        yield Link(meta, block, Stored(name, matrix_block((rows, columns)), False))
        first = stop
