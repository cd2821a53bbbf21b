"""States which elements of which tensors make up a routed expert, or a slice of its width; pure.

The one place that knows where a slice lies: the reader maps what it says, the proof of coverage counts it, and a part
for one host is cut along it.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llama4_dist.checkpoint.blocks import Block, matrix_block
from llama4_dist.checkpoint.names import ExpertLayout, Shape, down_name, expert_linear_name, gate_up_name
from llama4_dist.config import ModelConfig

PROJECTIONS = ("gate", "up", "down")


class ExpertRun(NamedTuple):
    """Columns [start, stop) of the width F of one routed expert."""

    layer: int
    expert: int
    start: int
    stop: int


class LinearCut(NamedTuple):
    """Outputs `rows` and inputs `columns` of a linear, by canonical name; None = all."""

    name: str
    rows: range | None
    columns: range | None


class Stored(NamedTuple):
    """A block of a tensor, by canonical name; `is_transposed` where the tensor is [out, in] and not input-major."""

    name: str
    block: Block
    is_transposed: bool


class ExpertBlocks(NamedTuple):
    """The three matrices of an expert slice."""

    gate: Stored
    up: Stored
    down: Stored

    @property
    def gate_up(self) -> Stored | None:
        """Gate and up as one matrix, where their rows follow each other."""
        name, gate, is_transposed = self.gate
        adjacent = self.up.block.start == gate.start + gate.row_length
        if name != self.up.name or is_transposed or not adjacent:
            return None
        return Stored(name, Block(gate.start, gate.num_rows, 2 * gate.row_length, gate.stride), False)


def expert_blocks(config: ModelConfig, layout: ExpertLayout, run: ExpertRun) -> ExpertBlocks:
    """Return where a slice lies in a whole checkpoint."""
    layer, expert, start, stop = run
    shape = (config.hidden_size, config.expert_width)
    if layout is ExpertLayout.FUSED:
        return _fused(gate_up_name(layer), down_name(layer), shape, expert, range(start, stop))
    return _linears(expert_linears(run), shape)


def part_blocks(config: ModelConfig, layout: ExpertLayout, held: ExpertRun, run: ExpertRun) -> ExpertBlocks:
    """Return where a slice lies in a part that holds `held`, a slice around it, as tensors of its own."""
    shape = (config.hidden_size, held.stop - held.start)
    if layout is ExpertLayout.FUSED:
        gate_up, down = part_names(layout, held)
        return _fused(gate_up, down, shape, 0, range(run.start - held.start, run.stop - held.start))
    return _linears(part_linears(held, run), shape)


def expert_linears(run: ExpertRun) -> tuple[LinearCut, LinearCut, LinearCut]:
    """Return the cuts of the three linears that a slice is, where each expert is stored by itself."""
    names = [expert_linear_name(run.layer, run.expert, one) for one in PROJECTIONS]
    return _cuts(names, range(run.start, run.stop))


def part_linears(held: ExpertRun, run: ExpertRun) -> tuple[LinearCut, LinearCut, LinearCut]:
    """Return the same for a part that holds `held`, a slice around it."""
    return _cuts(part_names(ExpertLayout.PER_EXPERT, held), range(run.start - held.start, run.stop - held.start))


def part_names(layout: ExpertLayout, held: ExpertRun) -> list[str]:
    """Name the tensors of a slice in a part: those of the whole, with the expert and its columns behind them."""
    layer, expert, start, stop = held
    if layout is ExpertLayout.FUSED:
        return [f"{name}.{expert}.{start}-{stop}" for name in (gate_up_name(layer), down_name(layer))]
    return [f"{expert_linear_name(layer, expert, one)}.{start}-{stop}" for one in PROJECTIONS]


def part_shapes(config: ModelConfig, layout: ExpertLayout, held: ExpertRun) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of the tensors of a slice in a part."""
    hidden, width = config.hidden_size, held.stop - held.start
    fused: list[Shape] = [(hidden, 2 * width), (width, hidden)]
    linears: list[Shape] = [(width, hidden), (width, hidden), (hidden, width)]
    yield from zip(part_names(layout, held), fused if layout is ExpertLayout.FUSED else linears, strict=True)


def _fused(gate_up: str, down: str, shape: tuple[int, int], index: int, columns: range) -> ExpertBlocks:
    """`index` is the expert's place in a stack of experts of `shape` (D, F)."""
    hidden, width = shape
    stack = (index + 1, hidden, 2 * width)
    up_columns = range(width + columns.start, width + columns.stop)
    return ExpertBlocks(
        gate=Stored(gate_up, matrix_block(stack, index, columns=columns), False),
        up=Stored(gate_up, matrix_block(stack, index, columns=up_columns), False),
        down=Stored(down, matrix_block((index + 1, width, hidden), index, rows=columns), False),
    )


def _cuts(names: list[str], columns: range) -> tuple[LinearCut, LinearCut, LinearCut]:
    """Gate and up give the width's columns, down takes them."""
    gate, up, down = names
    return LinearCut(gate, columns, None), LinearCut(up, columns, None), LinearCut(down, None, columns)


def _linears(linears: tuple[LinearCut, LinearCut, LinearCut], shape: tuple[int, int]) -> ExpertBlocks:
    hidden, width = shape
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    blocks = [matrix_block(one, rows=cut.rows, columns=cut.columns) for cut, one in zip(linears, shapes, strict=True)]
    return ExpertBlocks(*[Stored(cut.name, block, True) for cut, block in zip(linears, blocks, strict=True)])
