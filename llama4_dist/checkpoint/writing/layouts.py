"""Lays out a new checkpoint's tensors in either expert layout, from matrices that a provider has; pure."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from llama4_dist.checkpoint.blocks import matrix_block
from llama4_dist.checkpoint.expert_blocks import PROJECTIONS, ExpertRun, expert_blocks
from llama4_dist.checkpoint.names import ExpertLayout, Shape, expected_tensors, is_routed, stored_prefix
from llama4_dist.checkpoint.text_tensors import STORED_DTYPES
from llama4_dist.checkpoint.writing.moves import Move, SideBySide, Source
from llama4_dist.checkpoint.writing.shard_plan import NewTensor
from llama4_dist.config import ModelConfig


class ExpertMatrix(NamedTuple):
    """One matrix of a routed expert, as [out, in] where `is_transposed`, else input-major (x @ W)."""

    source: Source
    is_transposed: bool


class Provider(Protocol):
    """Where values come from; None = there are none, the tensor stays a hole there."""

    def tensor(self, name: str, shape: Shape) -> Source | None:
        """Return what fills a tensor that is no routed expert's."""

    def expert(self, layer: int, expert: int, projection: str) -> ExpertMatrix | None:
        """Return gate, up or down of a routed expert."""


def lay_out(config: ModelConfig, layout: ExpertLayout, provider: Provider) -> list[NewTensor]:
    """Return every text tensor with the moves that fill it, in the order of `expected_tensors`."""
    moves: dict[str, list[Move]] = {}
    for layer in config.moe_layer_ids:
        for expert in range(config.num_experts):
            for name, move in _expert_moves(config, layout, layer, expert, provider):
                moves.setdefault(name, []).append(move)
    shapes = expected_tensors(config, layout)
    for name, shape in shapes.items():
        source = None if is_routed(name) else provider.tensor(name, shape)
        if source is not None:
            moves[name] = [Move(source=source, target=matrix_block(shape))]
    prefix, dtype = stored_prefix(config), STORED_DTYPES[config.dtype]
    return [
        NewTensor(name=prefix + name, dtype=dtype, shape=shape, moves=tuple(moves.get(name, ())))
        for name, shape in shapes.items()
    ]


def _expert_moves(
    config: ModelConfig, layout: ExpertLayout, layer: int, expert: int, provider: Provider
) -> Iterator[tuple[str, Move]]:
    blocks = expert_blocks(config, layout, ExpertRun(layer, expert, 0, config.expert_width))
    matrices = [provider.expert(layer, expert, projection) for projection in PROJECTIONS]
    pairs = list(zip(matrices, blocks, strict=True))
    gate, up, _ = matrices
    if blocks.gate_up and gate and up and not gate.is_transposed and not up.is_transposed:
        both = ExpertMatrix(SideBySide(gate.source, up.source), is_transposed=False)
        pairs = [(both, blocks.gate_up), pairs[2]]
    for matrix, stored in pairs:
        if matrix is not None:
            turned = matrix.is_transposed != stored.is_transposed
            yield stored.name, Move(source=matrix.source, target=stored.block, is_transposed=turned)
