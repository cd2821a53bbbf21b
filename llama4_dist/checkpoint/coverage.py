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
from llama4_dist.checkpoint.quantised_coverage import Opened, is_as_meant, opened_as_stored, rectangle_of
from llama4_dist.checkpoint.quantised_tensors import QuantisedEntry
from llama4_dist.checkpoint.rectangles import Cell, Rectangle, cells
from llama4_dist.checkpoint.scheme import Scheme
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

    num_tensors: int  # as stored: of a quantised linear two or three
    num_ranges: int
    num_elements: int
    elements_of: Mapping[str, int]
    faults: tuple[CoverageFault, ...]


def prove_coverage(
    config: ModelConfig,
    layout: ExpertLayout,
    shape: ClusterShape,
    *,
    quantised: Mapping[str, QuantisedEntry] | None = None,
    scheme: Scheme | None = None,
    max_faults: int = 20,
) -> Coverage:
    """Check every tensor; at most `max_faults` faults are listed, the first of each tensor.

    Linears of `quantised` are checked by the tensors that they are stored as; ValueError where one's group is cut.
    """
    openings: dict[str, list[Rectangle]] = defaultdict(list)
    tensors = expected_tensors(config, layout)
    elements: dict[str, int] = dict.fromkeys(shape.units, 0)
    for worker, name, block in opened(config, layout, shape):
        openings[name].append(rectangle_of(worker, tensors[name], block))
        elements[worker] = elements.get(worker, 0) + block.num_elements
    stored = list(_stored(config, shape, tensors, openings, quantised or {}, scheme))
    faults = [fault for one in stored if (fault := _first_fault(one))]
    return Coverage(
        num_tensors=len(stored),
        num_ranges=sum(len(one.rectangles) for one in stored),
        num_elements=sum(map(prod, tensors.values())),
        elements_of=elements,
        faults=tuple(faults[:max_faults]),
    )


def _stored(
    config: ModelConfig,
    shape: ClusterShape,
    tensors: Mapping[str, Shape],
    openings: Mapping[str, Sequence[Rectangle]],
    quantised: Mapping[str, QuantisedEntry],
    scheme: Scheme | None,
) -> Iterator[Opened]:
    for name, tensor in tensors.items():
        laid, intended = openings.get(name, ()), num_intended(config, shape, name)
        if name in quantised:
            assert scheme is not None, "quantised tensors were found without a scheme"
            yield from opened_as_stored(name, quantised[name], scheme, laid, intended)
        else:
            yield Opened(name=name, shape=tensor, rectangles=tuple(laid), intended=intended)


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


def _first_fault(one: Opened) -> CoverageFault | None:
    whole = Rectangle(0, prod(one.shape[:-1]), 0, one.shape[-1], "")
    for cell in cells(whole, one.rectangles):
        if not is_as_meant(cell.workers, one.intended):
            return _fault(one, cell)
    return None


def _fault(one: Opened, cell: Cell) -> CoverageFault:
    return CoverageFault(
        tensor=one.name,
        rows=cell.rows,
        columns=cell.columns,
        workers=tuple(sorted(cell.workers)),
        num_intended=one.intended if isinstance(one.intended, int) else len(one.intended),
    )
