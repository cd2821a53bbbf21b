"""Opens a checkpoint directory and hands out its weights as views of read-only memory maps.

Opening checks config.json, the index and every shard's header against each other, and reads no weight. It knows nothing
of devices and never casts.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path

from torch import Tensor

from llama4_dist.checkpoint import names
from llama4_dist.checkpoint.config_file import CONFIG, parse_config
from llama4_dist.checkpoint.directory import has_file, read_small_file
from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.generation_file import GenerationDefaults, read_generation_defaults
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.index import Index, read_index
from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.quantised_reader import read_quantised, read_scales
from llama4_dist.checkpoint.scheme import Scheme, parse_scheme
from llama4_dist.checkpoint.shard import EVERYTHING, Shard
from llama4_dist.checkpoint.text_tensors import select_text_tensors
from llama4_dist.checkpoint.verify import check_digest, check_finite, read_manifest
from llama4_dist.config import ModelConfig


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
        selected = select_text_tensors(config, index, scheme)
        self.path = path
        self.config = config
        self.scheme = scheme  # of the linears in `quantised`
        self.quantised = selected.quantised
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

    def tensor(self, name: str) -> Tensor:
        """Return a text tensor by canonical name in its stored dtype; ValueError if this geometry has none such.

        A quantised linear is returned as the float32 weight that it stands for, which is a copy.
        """
        if name == names.LM_HEAD and self.config.tie_word_embeddings:
            name = names.EMBEDDING
        if name in self.quantised:
            return self._quantised(name).dequantise()
        return self._matrix(name)

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
        if self.layout is ExpertLayout.FUSED:
            return self._fused_expert(layer, expert, start, stop)
        cut = slice(start, stop)
        gate, up, down = (names.expert_linear_name(layer, expert, part) for part in names.EXPERT_PARTS)
        if gate in self.quantised:
            return QuantisedExpertWeights(
                gate_FD=self._quantised(gate, rows=cut),
                up_FD=self._quantised(up, rows=cut),
                down_DF=self._quantised(down, columns=cut),
            )
        return ExpertWeights(
            gate_DF=self._matrix(gate, rows=cut).T,
            up_DF=self._matrix(up, rows=cut).T,
            down_FD=self._matrix(down, columns=cut).T,
        )

    def expert_bytes(self, layer: int, expert: int) -> int:
        """Return the bytes that the stored tensors of a routed expert take."""
        if self.layout is ExpertLayout.FUSED:
            names_of = (names.gate_up_name(layer), names.down_name(layer))
            return sum(self.entries[name].num_bytes for name in names_of) // self.config.num_experts
        return sum(entry.num_bytes for entry in self._expert_entries(layer, expert))

    def release_expert(self, layer: int, expert: int) -> None:
        """Give the memory of a routed expert back; views of it stay valid and read the file again when touched."""
        if self.layout is ExpertLayout.FUSED:
            for name in (names.gate_up_name(layer), names.down_name(layer)):
                entry = self.entries[name]
                self._shards[entry.file].release(entry, expert)
            return
        for entry in self._expert_entries(layer, expert):
            self._shards[entry.file].release(entry)

    def _expert_entries(self, layer: int, expert: int) -> Iterator[TensorEntry]:
        """Yield the stored tensors of an expert that is stored by itself."""
        for part in names.EXPERT_PARTS:
            name = names.expert_linear_name(layer, expert, part)
            if name in self.quantised:
                yield from self.quantised[name].tensors()
            else:
                yield self.entries[name]

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
            read_scales(self._shards, linear)
        check_finite(((entry, self._view(entry)) for entry in self.entries.values()), advance)

    def close(self) -> None:
        """Let go of the memory maps; views handed out stay valid."""
        for shard in self._shards.values():
            shard.close()

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

    def _quantised(self, name: str, *, rows: slice = EVERYTHING, columns: slice = EVERYTHING) -> QuantisedLinear:
        assert self.scheme is not None, "quantised tensors were found without a scheme"
        linear = read_quantised(self._shards, self.quantised[name], self.scheme, rows=rows, columns=columns)
        with self._lock:
            self.bytes_mapped += linear.num_bytes
        return linear

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
