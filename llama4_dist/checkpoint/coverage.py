"""Proves that a cluster opens every parameter of a checkpoint exactly as often as meant, without reading weights.

What a worker opens comes from the functions its readers use: slices of experts from `expert_blocks`, shares of the
attention side from `partition`. How often each element is meant to be opened is stated here, apart from them, by what a
tensor is. Pure: ranges on tensors, no files.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from llama4_dist.checkpoint.blocks import Block, matrix_block
from llama4_dist.checkpoint.cluster_shape import ClusterShape
from llama4_dist.checkpoint.expert_blocks import expert_blocks
from llama4_dist.checkpoint.names import EMBEDDING, ExpertLayout, Shape, expected_tensors, is_routed
from llama4_dist.checkpoint.rectangles import Cell, Rectangle, cells
from llama4_dist.config import ModelConfig
from llama4_dist.partition import Partition, Share, shares_of

KEY_VALUE = ("k_proj.weight", "v_proj.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageFault:
    """Elements (rows and columns of the tensor seen as a matrix) that are not opened by as many workers as meant."""

    tensor: str
    rows: range
    columns: range
    workers: tuple[str, ...]
    num_intended: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What was checked, and the elements opened by each worker."""

    num_tensors: int
    num_ranges: int
    num_elements: int
    elements_of: Mapping[str, int]
    faults: tuple[CoverageFault, ...]


def prove_coverage(config: ModelConfig, layout: ExpertLayout, shape: ClusterShape, *, max_faults: int = 20) -> Coverage:
    """Check every tensor; at most `max_faults` faults are listed, the first of each tensor."""
    openings: dict[str, list[Rectangle]] = defaultdict(list)
    tensors = expected_tensors(config, layout)
    elements: dict[str, int] = dict.fromkeys(shape.units, 0)
    for worker, name, block in opened(config, layout, shape):
        openings[name].append(_rectangle(worker, tensors[name], block))
        elements[worker] = elements.get(worker, 0) + block.num_elements
    faults = [
        fault
        for name, tensor in tensors.items()
        if (fault := _first_fault(name, tensor, openings[name], num_intended(config, shape, name)))
    ]
    return Coverage(
        num_tensors=len(tensors),
        num_ranges=sum(map(len, openings.values())),
        num_elements=sum(map(prod, tensors.values())),
        elements_of=elements,
        faults=tuple(faults[:max_faults]),
    )


def opened(config: ModelConfig, layout: ExpertLayout, shape: ClusterShape) -> Iterator[tuple[str, str, Block]]:
    """Yield (worker, tensor, block) of everything that expert hosts and members of the attention group open."""
    for host in shape.units:
        for run in shape.runs_of(config, host):
            for stored in expert_blocks(config, layout, run):
                yield host, stored.name, stored.block
    for share in shares_of(config, shape.partition):
        for name, block in share_blocks(config, share):
            yield member_name(share), name, block


def share_blocks(config: ModelConfig, share: Share) -> Iterator[tuple[str, Block]]:
    """Yield the tensors that a member of the attention group opens, and what it reads of them."""
    for name, tensor in expected_tensors(config).items():
        if not is_routed(name) and _is_of_stage(config, share, name):
            rows, columns = share.cut(name)
            yield name, matrix_block(tensor, rows=rows, columns=columns)


def member_name(share: Share) -> str:
    return f"attention-{share.stage}.{share.rank}"


def num_intended(config: ModelConfig, shape: ClusterShape, name: str) -> int:
    """Return how many workers are meant to open each element of a tensor.

    Norms and routers are whole on every rank of their stage, keys and values on the ranks that share a head; a tied
    head is the embedding, which the last stage then needs as the first does.
    """
    if is_routed(name):
        return shape.num_replicas
    num_ranks = shape.partition.num_ranks
    if "norm" in name or name.endswith("router.weight"):
        return num_ranks
    if name.endswith(KEY_VALUE):
        return max(1, num_ranks // config.num_kv_heads)
    return 2 if name == EMBEDDING and _needs_embedding_twice(config, shape.partition) else 1


def _needs_embedding_twice(config: ModelConfig, partition: Partition) -> bool:
    return config.tie_word_embeddings and partition.num_stages > 1


def _is_of_stage(config: ModelConfig, share: Share, name: str) -> bool:
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) in share.layers
    if name == EMBEDDING:
        return share.is_first or (share.is_last and config.tie_word_embeddings)
    return share.is_last


def _rectangle(worker: str, shape: Shape, block: Block) -> Rectangle:
    """Return a block as rows and columns of its tensor; one that is no rectangle of it is a defect of ours."""
    width = shape[-1]
    row, column = divmod(block.start, width)
    assert block.num_rows == 1 or block.stride == width, f"{block} is no rectangle of {shape}"
    assert column + block.row_length <= width, f"{block} is no rectangle of {shape}"
    return Rectangle(row, row + block.num_rows, column, column + block.row_length, worker)


def _first_fault(name: str, shape: Shape, opened_by: Sequence[Rectangle], intended: int) -> CoverageFault | None:
    whole = Rectangle(0, prod(shape[:-1]), 0, shape[-1], "")
    for cell in cells(whole, opened_by):
        if len(set(cell.workers)) != intended or len(cell.workers) != intended:
            return _fault(name, cell, intended)
    return None


def _fault(name: str, cell: Cell, intended: int) -> CoverageFault:
    return CoverageFault(
        tensor=name, rows=cell.rows, columns=cell.columns, workers=tuple(sorted(cell.workers)), num_intended=intended
    )
