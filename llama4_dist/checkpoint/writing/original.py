"""A checkpoint on disk as the source of another: its stored tensors, and the files that lie beside them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from llama4_dist.checkpoint.blocks import Block, matrix_block
from llama4_dist.checkpoint.config_file import CONFIG
from llama4_dist.checkpoint.directory import allocated_bytes, has_file, open_file
from llama4_dist.checkpoint.generation_file import GENERATION_CONFIG
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.index import read_index
from llama4_dist.checkpoint.writing.moves import Move
from llama4_dist.checkpoint.writing.shard_plan import NewTensor
from llama4_dist.checkpoint.writing.stored import StoredMatrix

BESIDE = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


class Original:
    """The tensors of a directory, by the names they are stored under."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = read_index(path)

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return dict(self._index.entries)

    def matrix(self, entry: TensorEntry, block: Block) -> StoredMatrix:
        """Return a block of a tensor as the source of a move."""
        return StoredMatrix(self.path, entry, self._index.shards[entry.file], block)

    def whole(self, entry: TensorEntry) -> NewTensor:
        """Return the tensor as it is, to be copied byte by byte."""
        block = matrix_block(entry.shape)
        move = Move(source=self.matrix(entry, block), target=block)
        return NewTensor(name=entry.name, dtype=entry.dtype, shape=entry.shape, moves=(move,))

    def beside(self) -> dict[str, Path]:
        """Return the config, tokenizer and template files there are; a link may lead where `open_file` lets it."""
        found = {}
        for name in BESIDE:
            if has_file(self.path, name):
                open_file(self.path, name).close()
                found[name] = self.path / name
        return found

    def needed_bytes(self, tensors: Sequence[NewTensor]) -> int:
        """Return how much disk a copy can take at most: what is moved, or less where the original has holes."""
        files = {entry.file for entry in self._index.entries.values()}
        stored = sum(allocated_bytes(self.path / file) for file in files)
        return min(bytes_moved(tensors), stored)


def bytes_moved(tensors: Iterable[NewTensor]) -> int:
    return sum(tensor.bytes_moved for tensor in tensors)
