"""Plans the tensors of a cut of a quantised linear: numbers, scales, and the shape that packed ones state."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llama4_dist.checkpoint.blocks import Block, matrix_block
from llama4_dist.checkpoint.expert_blocks import LinearCut
from llama4_dist.checkpoint.quantised_blocks import QuantisedBlocks, quantised_blocks
from llama4_dist.checkpoint.quantised_tensors import PACKED, SCALE, STATED, QuantisedEntry
from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.checkpoint.writing.moves import Bits, Move
from llama4_dist.checkpoint.writing.original import Original
from llama4_dist.checkpoint.writing.shard_plan import NewTensor
from llama4_dist.errors import ConfigError

WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Given:
    """One row of values that lie in no file, as the source of a move."""

    values: Bits

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def row_length(self) -> int:
        return len(self.values)

    @property
    def row_quantum(self) -> int:
        return 1

    def read(self, first: int, last: int) -> Bits | None:
        return self.values[None][first:last]

    def copy_to(self, descriptor: int, offset: int, first: int, last: int) -> bool:
        return False


def cut_tensors(
    original: Original, entry: QuantisedEntry, scheme: Scheme, cut: LinearCut, stored_name: str
) -> Iterator[NewTensor]:
    """Yield the tensors of `cut`, under the name that a weight will have; ConfigError where it cannot be cut."""
    try:
        blocks = quantised_blocks(entry, scheme, rows=cut.rows, columns=cut.columns)
    except ValueError as error:
        raise ConfigError(f"{cut.name}: {error}") from None
    yield _numbers(original, entry, scheme, blocks, cut, stored_name)
    scale, block = blocks.scales
    shape = (block.num_rows, block.row_length) if len(entry.scale.shape) == 2 else (block.num_rows,)
    move = Move(source=original.matrix(scale, block), target=_dense(block))
    yield NewTensor(name=stored_name + SCALE, dtype=scale.dtype, shape=shape, moves=(move,))
    if entry.stated_shape is not None:
        dtype = np.dtype(np.int64 if entry.stated_shape.dtype == "I64" else np.int32)
        stated = np.array([block.num_rows, blocks.width], dtype=dtype)
        move = Move(source=Given(stated), target=matrix_block((2,)))
        yield NewTensor(name=stored_name + STATED, dtype=entry.stated_shape.dtype, shape=(2,), moves=(move,))


def _numbers(
    original: Original, entry: QuantisedEntry, scheme: Scheme, blocks: QuantisedBlocks, cut: LinearCut, name: str
) -> NewTensor:
    block = blocks.stored[1]
    if scheme.is_packed:
        name, block = name + PACKED, _words(block, cut, scheme)
    move = Move(source=original.matrix(entry.stored, block), target=_dense(block))
    return NewTensor(name=name, dtype=entry.stored.dtype, shape=(block.num_rows, block.row_length), moves=(move,))


def _words(block: Block, cut: LinearCut, scheme: Scheme) -> Block:
    """Return a block of bytes as one of words; a part has words of its own, so that none may be cut."""
    numbers = (block.start, block.row_length, block.stride)
    if any(number % WORD_BYTES for number in numbers):
        per_word = WORD_BYTES * 8 // scheme.number.bits
        raise ConfigError(
            f"inputs {cut.columns} of {cut.name} cut a word of {per_word} packed numbers: take slices that begin and "
            f"end at multiples of {per_word}"
        )
    start, row_length, stride = (number // WORD_BYTES for number in numbers)
    return Block(start, block.num_rows, row_length, stride)


def _dense(block: Block) -> Block:
    return Block(0, block.num_rows, block.row_length, block.row_length)
