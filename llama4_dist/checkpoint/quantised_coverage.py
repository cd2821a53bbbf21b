"""Turns what is opened of quantised linears into what is opened of the tensors they are stored as; pure.

Numbers are opened as often as the weights they stand for, and so are scales that are cut with them. Scales of outputs
whose inputs are cut, and the stated shape, are opened whole by each worker that opens some of the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama4_dist.checkpoint.blocks import Block
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.names import Shape
from llama4_dist.checkpoint.quantised_blocks import Place, as_bytes, quantised_blocks
from llama4_dist.checkpoint.quantised_tensors import PACKED, SCALE, STATED, QuantisedEntry
from llama4_dist.checkpoint.rectangles import Rectangle
from llama4_dist.checkpoint.scheme import Scheme

CUT_BY_INPUT = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A stored tensor, what is opened of it, and how often each element is meant to be, or by which workers."""

    name: str  # canonical
    shape: Shape
    rectangles: tuple[Rectangle, ...]
    intended: int | tuple[str, ...]


def rectangle_of(worker: str, shape: Shape, block: Block) -> Rectangle:
    """Return a block as rows and columns of its tensor; one that is no rectangle of it is a defect of ours."""
    width = shape[-1]
    row, column = divmod(block.start, width)
    assert block.num_rows == 1 or block.stride == width, f"{block} is no rectangle of {shape}"
    assert column + block.row_length <= width, f"{block} is no rectangle of {shape}"
    return Rectangle(row, row + block.num_rows, column, column + block.row_length, worker)


def opened_as_stored(
    name: str, entry: QuantisedEntry, scheme: Scheme, laid: Sequence[Rectangle], intended: int
) -> tuple[Opened, ...]:
    """Return the stored tensors of a linear, of which `laid` is opened and meant to be opened `intended` times.

    ValueError where a group is cut.
    """
    cuts = [
        quantised_blocks(entry, scheme, rows=range(one.top, one.bottom), columns=range(one.left, one.right))
        for one in laid
    ]
    workers = tuple(one.worker for one in laid)
    is_whole = scheme.group_size is None and name.endswith(CUT_BY_INPUT)
    packed = as_bytes(entry.stored) if scheme.is_packed else entry.stored
    found = [
        _opened(name + (PACKED if scheme.is_packed else ""), packed, workers, [c.stored for c in cuts], intended),
        _opened(
            name + SCALE,
            replace(entry.scale, shape=(entry.shape[0], scheme.num_groups(entry.shape[1]))),
            workers,
            [cut.scales for cut in cuts],
            workers if is_whole else intended,
        ),
    ]
    if entry.stated_shape is not None:
        whole = tuple(Rectangle(0, 1, 0, 2, worker) for worker in workers)
        found.append(Opened(name=name + STATED, shape=(1, 2), rectangles=whole, intended=workers))
    return tuple(found)


def is_as_meant(workers: Sequence[str], intended: int | tuple[str, ...]) -> bool:
    """Tell whether an element is opened by as many different workers as meant, or by just those."""
    if isinstance(intended, int):
        return len(set(workers)) == len(workers) == intended
    return sorted(workers) == sorted(intended)


def _opened(
    name: str, entry: TensorEntry, workers: Sequence[str], places: Sequence[Place], intended: int | tuple[str, ...]
) -> Opened:
    laid = [rectangle_of(worker, entry.shape, block) for worker, (_, block) in zip(workers, places, strict=True)]
    return Opened(name=name, shape=entry.shape, rectangles=tuple(laid), intended=intended)
