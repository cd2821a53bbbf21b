"""Opens a checkpoint directory and hands out its weights as views of read-only memory maps.

Opening checks config.json, the index and every shard's header against each other, and reads no weight. It knows nothing
of devices and never casts.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path

from torch import Tensor

from llama4_dist.checkpoint import names
from llama4_dist.checkpoint.blocks import matrix_block
from llama4_dist.checkpoint.config_file import CONFIG, parse_config
from llama4_dist.checkpoint.directory import has_file, read_small_file
from llama4_dist.checkpoint.expert_blocks import ExpertRun, Stored
from llama4_dist.checkpoint.expert_format import expert_formats
from llama4_dist.checkpoint.expert_places import ExpertPlaces
from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.generation_file import GenerationDefaults, read_generation_defaults
from llama4_dist.checkpoint.header import ITEM_BYTES, TensorEntry
from llama4_dist.checkpoint.index import Index, read_index
from llama4_dist.checkpoint.part import read_part
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.quantised_blocks import Place, quantised_blocks
from llama4_dist.checkpoint.quantised_reader import read_quantised, read_scales
from llama4_dist.checkpoint.quantised_shares import check_shares
from llama4_dist.checkpoint.scheme import Scheme, parse_scheme
from llama4_dist.checkpoint.shard import Shard
from llama4_dist.checkpoint.text_tensors import select_text_tensors
from llama4_dist.checkpoint.verify import check_digest, check_finite, read_manifest
from llama4_dist.config import ModelConfig
from llama4_dist.partition import Partition, Share


class Checkpoint:
    """An opened checkpoint. Safe to use from several threads; views outlive `close`."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        generation: GenerationDefaults,
        index: Index,
        scheme: Scheme | None = None,
    ) -> None:
        self.part = read_part(path, config)  # None = the whole checkpoint, as published
        selected = select_text_tensors(config, index, self.part, scheme)
        self.path = path
        self.config = config
        self.scheme = scheme  # of the linears in `quantised`
        self.quantised = selected.quantised
        self.expert_formats = expert_formats(selected.entries, selected.quantised, scheme)
        self.generation = generation
        self.layout = selected.layout
        self.entries: Mapping[str, TensorEntry] = selected.entries  # by canonical name
        self.unused = selected.unused
        self.unused_bytes = sum(index.entries[name].num_bytes for name in selected.unused)
        self.model_hash = self.part.model_hash if self.part else _model_hash(config, selected.entries)
        self.bytes_mapped = 0  # of all views handed out; says nothing of pages really read
        self._places = ExpertPlaces(path, config, selected, scheme, self.part)
        self._lock = threading.Lock()
        self._shards = {name: Shard(path, name, identity) for name, identity in index.shards.items()}

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open the checkpoint directory `path`; raise CheckpointError naming the file and tensor that is wrong."""
        path = Path(path)
        index = read_index(path)
        raw = read_small_file(path, CONFIG)
        config = parse_config(raw)
        generation = read_generation_defaults(path, config.vocab_size)
        return cls(path, config, generation, index, parse_scheme(raw, CONFIG))

    @property
    def num_parameters(self) -> int:
        """Weights that the text engine reads; scales are none."""
        parts = {part.name for linear in self.quantised.values() for part in linear.tensors()}
        plain = sum(entry.num_elements for entry in self.entries.values() if entry.name not in parts)
        return plain + sum(prod(linear.shape) for linear in self.quantised.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors that the text engine reads."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The files, in order."""
        return tuple(self._shards)

    def tensor(self, name: str, *, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return a text tensor by canonical name in its stored dtype, or rows and columns of a matrix.

        A quantised linear is returned as the float32 weight that it stands for, which is a copy. ValueError if this
        geometry has none such, and for columns that cut a group of a quantised one.
        """
        if name == names.LM_HEAD and self.config.tie_word_embeddings:
            name = names.EMBEDDING
        if name in self.quantised:
            return self._quantised(name, rows, columns).dequantise()
        if name not in self.entries:
            raise self._places.absent(name)
        entry = self.entries[name]
        view = self._view((entry, matrix_block(entry.shape, rows=rows, columns=columns)))
        return view.view(entry.shape) if rows is None and columns is None else view

    def shares_of(self, partition: Partition) -> tuple[Share, ...]:
        """Return what each member of an attention group would read; ValueError where it cannot be cut so."""
        return check_shares(self.config, partition, self.quantised, self.scheme)

    def expert(
        self, layer: int, expert: int, start: int = 0, stop: int | None = None
    ) -> ExpertWeights | QuantisedExpertWeights:
        """Return columns [start, stop) of the width F of a routed expert; the whole expert by default.

        ValueError for a cut through a group of a quantised one.
        """
        width = self.config.expert_width
        stop = width if stop is None else stop
        if not 0 <= start < stop <= width:
            raise ValueError(f"slice [{start}, {stop}) does not lie in the expert width {width}")
        if layer not in self.config.moe_layer_ids or not 0 <= expert < self.config.num_experts:
            raise ValueError(f"there is no routed expert {expert} in layer {layer}")
        run = ExpertRun(layer, expert, start, stop)
        linears = self._places.quantised_linears(run)
        if linears is not None:
            gate_FD, up_FD, down_DF = (self._quantised(*linear) for linear in linears)
            return QuantisedExpertWeights(gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF)
        blocks = self._places.blocks(run)
        if blocks.gate_up is not None:
            gate_up_D2F = self._input_major(blocks.gate_up)
            gate_DF, up_DF = gate_up_D2F[:, : stop - start], gate_up_D2F[:, stop - start :]
        else:
            gate_up_D2F = None
            gate_DF, up_DF = self._input_major(blocks.gate), self._input_major(blocks.up)
        down_FD = self._input_major(blocks.down)
        return ExpertWeights(gate_DF=gate_DF, up_DF=up_DF, down_FD=down_FD, gate_up_D2F=gate_up_D2F)

    def release_expert(
        self, layer: int, expert: int, start: int = 0, stop: int | None = None, *, around: int = 0
    ) -> None:
        """Give the memory of columns [start, stop) of a routed expert back; views read the file again when touched.

        So does what lies `around` bytes beside. Of a matrix that is cut across its rows all goes: the kernel maps more
        around each touched page than its row.
        """
        for entry, block in self._places.stored(layer, expert, start, stop):
            self._shards[entry.file].release(entry, block, around=around)

    def read_ahead_expert(self, layer: int, expert: int, start: int = 0, stop: int | None = None) -> None:
        """Have the kernel begin to read columns [start, stop) of a routed expert; returns before they are there."""
        for entry, block in self._places.stored(layer, expert, start, stop):
            self._shards[entry.file].read_ahead(entry, block)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every byte: manifest.sha256 if there is one, then NaN and infinities. `progress` gets bytes done, total.

        Raise CheckpointError for the first file, tensor or scale that is damaged.
        """
        digests = read_manifest(self.path, [CONFIG, *self._shards])
        sizes = {name: (self.path / name).stat().st_size for name in digests if has_file(self.path, name)}
        total = self.total_bytes + sum(sizes.values())
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        for name, digest in digests.items():
            check_digest(self.path, name, digest, advance)
        for linear in self.quantised.values():
            assert self.scheme is not None, "quantised tensors were found without a scheme"
            read_scales(self._shards, quantised_blocks(linear, self.scheme).scales)
        stored = self.entries.values()
        check_finite(((e, self._shards[e.file].matrix(e, matrix_block(e.shape))) for e in stored), advance)

    def close(self) -> None:
        """Let go of the memory maps; views handed out stay valid."""
        for shard in self._shards.values():
            shard.close()

    def _input_major(self, stored: Stored) -> Tensor:
        matrix = self._view((self.entries[stored.name], stored.block))
        return matrix.T if stored.is_transposed else matrix

    def _view(self, place: Place) -> Tensor:
        entry, block = place
        with self._lock:
            self.bytes_mapped += block.num_elements * ITEM_BYTES[entry.dtype]
        return self._shards[entry.file].matrix(entry, block)

    def _quantised(self, name: str, rows: range | None = None, columns: range | None = None) -> QuantisedLinear:
        assert self.scheme is not None, "quantised tensors were found without a scheme"
        linear = read_quantised(self._shards, self.quantised[name], self.scheme, rows=rows, columns=columns)
        with self._lock:
            self.bytes_mapped += linear.num_bytes
        return linear


def _model_hash(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> str:
    """Return a sha256 that two nodes compare: geometry and where each tensor lies, never the weights themselves."""
    tensors = [
        (name, entry.dtype, entry.shape, entry.file, entry.start, entry.stop) for name, entry in sorted(entries.items())
    ]
    canonical = json.dumps([asdict(config), tensors], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
