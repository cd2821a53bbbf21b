"""Opens a checkpoint directory and hands out its weights as views of read-only memory maps.

Opening checks config.json, the index and every shard's header against each other, and reads no weight. It knows nothing
of devices and never casts.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from llama4_dist.checkpoint import names
from llama4_dist.checkpoint.config_file import CONFIG, read_config
from llama4_dist.checkpoint.directory import has_file
from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.generation_file import GenerationDefaults, read_generation_defaults
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.index import Index, read_index
from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.shard import EVERYTHING, Shard
from llama4_dist.checkpoint.text_tensors import select_text_tensors
from llama4_dist.checkpoint.verify import check_digest, check_finite, read_manifest
from llama4_dist.config import ModelConfig


class Checkpoint:
    """An opened checkpoint. Safe to use from several threads; views outlive `close`."""

    def __init__(self, path: Path, config: ModelConfig, generation: GenerationDefaults, index: Index) -> None:
        selected = select_text_tensors(config, index)
        self.path = path
        self.config = config
        self.generation = generation
        self.layout = selected.layout
        self.entries: Mapping[str, TensorEntry] = selected.entries  # by canonical name
        self.unused = selected.unused
        self.unused_bytes = sum(index.entries[name].num_bytes for name in selected.unused)
        self.model_hash = _model_hash(config, selected.entries)
        self.bytes_mapped = 0  # of all views handed out; says nothing of pages really read
        self._lock = threading.Lock()
        self._shards = {name: Shard(path, name, identity) for name, identity in index.shards.items()}

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open the checkpoint directory `path`; raise CheckpointError naming the file and tensor that is wrong."""
        path = Path(path)
        index = read_index(path)
        config = read_config(path)
        return cls(path, config, read_generation_defaults(path, config.vocab_size), index)

    @property
    def num_parameters(self) -> int:
        """Elements of the tensors that the text engine reads."""
        return sum(entry.num_elements for entry in self.entries.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors that the text engine reads."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def tensor(self, name: str) -> Tensor:
        """Return a text tensor by canonical name in its stored dtype; ValueError if this geometry has none such."""
        if name == names.LM_HEAD and self.config.tie_word_embeddings:
            name = names.EMBEDDING
        return self._matrix(name)

    def expert(self, layer: int, expert: int, start: int = 0, stop: int | None = None) -> ExpertWeights:
        """Return columns [start, stop) of the width F of a routed expert; the whole expert by default."""
        width = self.config.expert_width
        stop = width if stop is None else stop
        if not 0 <= start < stop <= width:
            raise ValueError(f"slice [{start}, {stop}) does not lie in the expert width {width}")
        if layer not in self.config.moe_layer_ids or not 0 <= expert < self.config.num_experts:
            raise ValueError(f"there is no routed expert {expert} in layer {layer}")
        if self.layout is ExpertLayout.FUSED:
            return self._fused_expert(layer, expert, start, stop)
        cut = slice(start, stop)
        return ExpertWeights(
            gate_DF=self._matrix(names.expert_linear_name(layer, expert, "gate"), rows=cut).T,
            up_DF=self._matrix(names.expert_linear_name(layer, expert, "up"), rows=cut).T,
            down_FD=self._matrix(names.expert_linear_name(layer, expert, "down"), columns=cut).T,
        )

    def release_expert(
        self, layer: int, expert: int, start: int = 0, stop: int | None = None, *, around: int = 0
    ) -> None:
        """Give the memory of columns [start, stop) of a routed expert back; views read the file again when touched.

        So does what lies `around` bytes beside. Of a matrix that is cut across its rows all goes: the kernel maps more
        around each touched page than its row.
        """
        for name, index, rows, _ in self._expert_parts(layer, expert, start, stop):
            entry = self.entries[name]
            self._shards[entry.file].release(entry, index, rows=rows, around=around)

    def read_ahead_expert(self, layer: int, expert: int, start: int = 0, stop: int | None = None) -> None:
        """Have the kernel begin to read columns [start, stop) of a routed expert; returns before they are there."""
        for name, index, rows, columns in self._expert_parts(layer, expert, start, stop):
            entry = self.entries[name]
            self._shards[entry.file].read_ahead(entry, index, rows=rows, columns=columns)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every byte: manifest.sha256 if there is one, then NaN and infinities. `progress` gets bytes done, total.

        Raise CheckpointError for the first file or tensor that is damaged.
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
        check_finite(((entry, self._view(entry)) for entry in self.entries.values()), advance)

    def close(self) -> None:
        """Let go of the memory maps; views handed out stay valid."""
        for shard in self._shards.values():
            shard.close()

    def _expert_parts(
        self, layer: int, expert: int, start: int, stop: int | None
    ) -> list[tuple[str, int | None, slice, slice]]:
        """Return (name, index in a stack, rows, columns) of all that columns [start, stop) of an expert lie in."""
        width = self.config.expert_width
        cut = slice(start, width if stop is None else stop)
        if self.layout is ExpertLayout.FUSED:
            name = names.gate_up_name(layer)
            upper = slice(width + cut.start, width + cut.stop)
            gate_up = [cut, upper] if cut != slice(0, width) else [EVERYTHING]
            return [(name, expert, EVERYTHING, columns) for columns in gate_up] + [
                (names.down_name(layer), expert, cut, EVERYTHING)
            ]
        gate, up, down = (names.expert_linear_name(layer, expert, part) for part in ("gate", "up", "down"))
        return [(gate, None, cut, EVERYTHING), (up, None, cut, EVERYTHING), (down, None, EVERYTHING, cut)]

    def _fused_expert(self, layer: int, expert: int, start: int, stop: int) -> ExpertWeights:
        width = self.config.expert_width
        name = names.gate_up_name(layer)
        down_FD = self._matrix(names.down_name(layer), expert, rows=slice(start, stop))
        if stop - start == width:
            gate_up_D2F = self._matrix(name, expert)
            return ExpertWeights(
                gate_DF=gate_up_D2F[:, :width],
                up_DF=gate_up_D2F[:, width:],
                down_FD=down_FD,
                gate_up_D2F=gate_up_D2F,
            )
        gate_DF = self._matrix(name, expert, columns=slice(start, stop))
        up_DF = self._matrix(name, expert, columns=slice(width + start, width + stop))
        return ExpertWeights(gate_DF=gate_DF, up_DF=up_DF, down_FD=down_FD)

    def _matrix(
        self, name: str, index: int | None = None, *, rows: slice = EVERYTHING, columns: slice = EVERYTHING
    ) -> Tensor:
        if name not in self.entries:
            raise ValueError(f"the checkpoint has no text tensor {name!r}")
        view = self._view(self.entries[name], index, rows=rows, columns=columns)
        with self._lock:
            self.bytes_mapped += view.numel() * view.element_size()
        return view

    def _view(
        self, entry: TensorEntry, index: int | None = None, *, rows: slice = EVERYTHING, columns: slice = EVERYTHING
    ) -> Tensor:
        return self._shards[entry.file].matrix(entry, index, rows=rows, columns=columns)


def _model_hash(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> str:
    """Return a sha256 that two nodes compare: geometry and where each tensor lies, never the weights themselves."""
    tensors = [
        (name, entry.dtype, entry.shape, entry.file, entry.start, entry.stop) for name, entry in sorted(entries.items())
    ]
    canonical = json.dumps([asdict(config), tensors], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
