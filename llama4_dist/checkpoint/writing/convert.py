"""Rewrites a checkpoint in another layout: experts fused or one by one, Meta's names and shapes or Hugging Face's.

Numbers are moved and turned, never computed with: there and back gives the same bytes. Tensors that the text model does
not have (vision) keep their names and bytes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama4_dist.checkpoint.blocks import matrix_block
from llama4_dist.checkpoint.config_file import read_config
from llama4_dist.checkpoint.expert_blocks import PROJECTIONS, ExpertRun, expert_blocks
from llama4_dist.checkpoint.fault import fault
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.names import ExpertLayout, Shape, expected_tensors, stored_prefix
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.text_tensors import META_EMBEDDING, STORED_DTYPES, check_entry
from llama4_dist.checkpoint.writing.directory import new_directory
from llama4_dist.checkpoint.writing.layouts import ExpertMatrix, lay_out
from llama4_dist.checkpoint.writing.meta_layout import links, meta_shapes
from llama4_dist.checkpoint.writing.moves import Move
from llama4_dist.checkpoint.writing.original import Original, bytes_moved
from llama4_dist.checkpoint.writing.shard_plan import NewTensor, plan_shards
from llama4_dist.checkpoint.writing.stored import StoredMatrix
from llama4_dist.checkpoint.writing.write import Counter, Progress, check_disk, write_checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What came out."""

    num_tensors: int
    num_bytes: int
    num_files: int


def to_layout(path: Path, layout: ExpertLayout) -> list[NewTensor]:
    """Plan the same checkpoint with its routed experts in the other layout."""
    checkpoint = _whole(path)
    if checkpoint.layout is layout or not checkpoint.config.moe_layer_ids:
        raise ConfigError(f"{path} needs no conversion: its experts are {checkpoint.layout} already, or there are none")
    original = Original(path)
    return lay_out(checkpoint.config, layout, _Stored(checkpoint, original)) + _unused(checkpoint, original)


def to_meta(path: Path) -> list[NewTensor]:
    """Plan the checkpoint in Meta's names and shapes."""
    checkpoint = _whole(path)
    config, original = checkpoint.config, Original(path)
    if config.tie_word_embeddings:
        raise ConfigError(f"{path} has a tied head, which Meta's layout cannot express")
    moves: dict[str, list[Move]] = defaultdict(list)
    for meta, block, stored in links(config, checkpoint.layout):
        source = original.matrix(checkpoint.entries[stored.name], stored.block)
        moves[meta].append(Move(source=source, target=block, is_transposed=stored.is_transposed))
    return _tensors(config, meta_shapes(config), moves) + _unused(checkpoint, original)


def to_hugging_face(path: Path, layout: ExpertLayout) -> list[NewTensor]:
    """Plan a checkpoint in Meta's layout in Hugging Face's names and shapes."""
    config, original = read_config(path), Original(path)
    entries, shapes = original.entries, meta_shapes(config)
    if META_EMBEDDING not in entries:
        raise ConfigError(f"{path} is not in Meta's layout: it has no {META_EMBEDDING}")
    for name, shape in shapes.items():
        if name not in entries:
            raise fault(str(path), "is missing, though config.json calls for it", tensor=name)
        check_entry(entries[name], shape, STORED_DTYPES[config.dtype])
    moves: dict[str, list[Move]] = defaultdict(list)
    for meta, block, stored in links(config, layout):
        source = original.matrix(entries[meta], block)
        moves[stored.name].append(Move(source=source, target=stored.block, is_transposed=stored.is_transposed))
    others = [original.whole(entry) for name, entry in sorted(entries.items()) if name not in shapes]
    prefix = stored_prefix(config)
    named = {prefix + name: shape for name, shape in expected_tensors(config, layout).items()}
    return _tensors(config, named, {prefix + name: one for name, one in moves.items()}) + others


def write_converted(
    path: Path, tensors: Sequence[NewTensor], out: Path, *, shard_bytes: int, progress: Progress | None = None
) -> Converted:
    """Write planned tensors with the files beside the original's; all or nothing."""
    original, shards = Original(path), plan_shards(tensors, shard_bytes)
    with new_directory(out) as stage:
        check_disk(stage, shards, original.needed_bytes(tensors))
        write_checkpoint(stage, shards, original.beside(), Counter(bytes_moved(tensors), progress))
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    return Converted(num_tensors=len(tensors), num_bytes=num_bytes, num_files=len(shards))


class _Stored:
    """Provides the matrices of an opened checkpoint, whichever its layout."""

    def __init__(self, checkpoint: Checkpoint, original: Original) -> None:
        self._checkpoint, self._original = checkpoint, original

    def tensor(self, name: str, shape: Shape) -> StoredMatrix:
        return self._original.matrix(self._checkpoint.entries[name], matrix_block(shape))

    def expert(self, layer: int, expert: int, projection: str) -> ExpertMatrix:
        config = self._checkpoint.config
        run = ExpertRun(layer, expert, 0, config.expert_width)
        stored = expert_blocks(config, self._checkpoint.layout, run)[PROJECTIONS.index(projection)]
        source = self._original.matrix(self._checkpoint.entries[stored.name], stored.block)
        return ExpertMatrix(source, stored.is_transposed)


def _tensors(config: ModelConfig, shapes: Mapping[str, Shape], moves: Mapping[str, Iterable[Move]]) -> list[NewTensor]:
    dtype = STORED_DTYPES[config.dtype]
    return [NewTensor(name=name, dtype=dtype, shape=shape, moves=tuple(moves[name])) for name, shape in shapes.items()]


def _unused(checkpoint: Checkpoint, original: Original) -> list[NewTensor]:
    entries: Mapping[str, TensorEntry] = original.entries
    return [original.whole(entries[name]) for name in checkpoint.unused]


def _whole(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path)
    if checkpoint.part is not None and checkpoint.part.tensors is not None:
        raise ConfigError(f"{path} is {checkpoint.part.label}, a part of a checkpoint: convert the whole")
    if checkpoint.scheme is not None:
        raise ConfigError(
            f"{path} is quantised ({checkpoint.scheme.title}), which has one linear an expert in any layout: convert "
            "the checkpoint that it was made of, and quantise the result"
        )
    return checkpoint
