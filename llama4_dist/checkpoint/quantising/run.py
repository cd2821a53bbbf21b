"""Carries a plan out: quantises shard after shard, and keeps what a run before finished.

config.json, without which a folder is no checkpoint, comes last. Memory is that of one linear in float32, a few times.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_dist.checkpoint.blocks import matrix_block
from llama4_dist.checkpoint.config_file import CONFIG
from llama4_dist.checkpoint.directory import has_file, open_file, read_exactly, read_small_file
from llama4_dist.checkpoint.fault import fault
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.index import INDEX, Index, read_index
from llama4_dist.checkpoint.part import PART
from llama4_dist.checkpoint.quantised import QuantisedLinear
from llama4_dist.checkpoint.quantising.files import (
    CHUNK_BYTES,
    copy_whole,
    digest_of,
    whole_file,
    write_at,
    write_whole,
)
from llama4_dist.checkpoint.quantising.folder import alone_in, begun, fingerprint
from llama4_dist.checkpoint.quantising.journal import (
    PARTIAL_JOURNAL,
    REPORT,
    Journal,
    ShardRecord,
    TensorError,
    write_journal,
)
from llama4_dist.checkpoint.quantising.plan import Copy, Plan, Quantise, ShardPlan, Targets, plan_quantisation
from llama4_dist.checkpoint.quantising.rounding import quantise_linear
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import KEY, Scheme, scheme_json
from llama4_dist.checkpoint.shard import TORCH_DTYPES, Shard
from llama4_dist.checkpoint.strict_json import parse_object
from llama4_dist.checkpoint.verify import MANIFEST
from llama4_dist.errors import ConfigError

Progress = Callable[[int, int], None]  # bytes of the source that are done, and in all
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_NOT_COPIED = {CONFIG, INDEX, MANIFEST, PART, REPORT, PARTIAL_JOURNAL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What lies in the new folder now."""

    num_bytes: int
    source_bytes: int
    shards: tuple[str, ...]
    kept: tuple[str, ...]  # shards that a run before had finished
    errors: tuple[TensorError, ...]


def quantise_checkpoint(
    source: Path,
    out: Path,
    scheme: Scheme,
    *,
    targets: Targets = Targets.EXPERTS,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Write `source`, quantised, to the folder `out`, which is new, or holds what an interrupted run of the same left.

    Raise CheckpointError for a source that is damaged, ConfigError for one that cannot be quantised so, ConflictError
    for a folder that holds something else, PreconditionError (DISK_FULL) where there is no room: make some, call again.
    """
    checkpoint = Checkpoint.open(source)
    if checkpoint.scheme is not None:
        raise ConfigError(
            f"{source} is quantised already ({checkpoint.scheme.title}): take the checkpoint it came from"
        )
    if checkpoint.part is not None and checkpoint.part.tensors is not None:
        raise ConfigError(f"{source} is {checkpoint.part.label}, a part of a checkpoint: quantise the whole")
    index = read_index(source)
    plan = plan_quantisation(checkpoint.config, index, scheme, targets)
    if not any(isinstance(part, Quantise) for shard in plan.shards for part in shard.parts):
        raise ConfigError(f"{source} has no linears that targets={targets.value!r} names")
    if out.resolve() == source.resolve():
        raise ConfigError(f"the new checkpoint cannot be written over its source {source}: choose another folder")
    with alone_in(out):
        options = {"scheme": asdict(scheme), "targets": targets.value}
        journal = begun(out, Journal(source=fingerprint(checkpoint, index), options=options, shards={}))
        return _Run(source, out, index, plan, journal, progress).finish(scheme)


class _Run:
    """One run; `journal` grows with every shard."""

    def __init__(self, source: Path, out: Path, index: Index, plan: Plan, journal: Journal, progress: Progress) -> None:
        self._source, self._out = source, out
        self._plan, self._journal = plan, journal
        self._shards = {name: Shard(source, name, identity) for name, identity in index.shards.items()}
        self._is_single = not has_file(source, INDEX)
        self._progress = progress
        self._total = sum(shard.source_bytes for shard in plan.shards)
        self._done = 0

    def finish(self, scheme: Scheme) -> Result:
        """Make the shards that are missing, then everything else."""
        kept = []
        for shard in self._plan.shards:
            if self._is_finished(shard):
                kept.append(shard.name)
                self._advance(shard.source_bytes)
            else:
                record = self._write_shard(shard)
                self._journal = self._journal.with_shard(shard.name, record)
                write_journal(self._out, PARTIAL_JOURNAL, self._journal)
        self._write_the_rest(scheme)
        records = [self._journal.shards[shard.name] for shard in self._plan.shards]
        return Result(
            num_bytes=sum(record.num_bytes for record in records),
            source_bytes=self._total,
            shards=tuple(shard.name for shard in self._plan.shards),
            kept=tuple(kept),
            errors=tuple(error for record in records for error in record.errors),
        )

    def _is_finished(self, shard: ShardPlan) -> bool:
        record = self._journal.shards.get(shard.name)
        if record is None or not has_file(self._out, shard.name):
            return False
        if (self._out / shard.name).stat().st_size != record.num_bytes:
            return False
        return digest_of(self._out, shard.name) == record.sha256

    def _write_shard(self, shard: ShardPlan) -> ShardRecord:
        errors: list[TensorError] = []
        offsets = shard.offsets()
        with whole_file(self._out, shard.name, shard.num_bytes) as descriptor:
            write_at(descriptor, shard.header(), 0)
            for part in shard.parts:
                if isinstance(part, Copy):
                    self._copy(part.source, descriptor, offsets[part.source.name])
                else:
                    errors.append(self._quantise(part, descriptor, offsets))
                self._advance(part.source_bytes)
        sha256 = digest_of(self._out, shard.name)
        return ShardRecord(num_bytes=shard.num_bytes, sha256=sha256, errors=tuple(errors))

    def _copy(self, entry: TensorEntry, descriptor: int, position: int) -> None:
        with open_file(self._source, entry.file) as file:
            file.seek(entry.start)
            for start in range(0, entry.num_bytes, CHUNK_BYTES):
                chunk = read_exactly(file, min(CHUNK_BYTES, entry.num_bytes - start), entry.file)
                write_at(descriptor, chunk, position + start)

    @torch.inference_mode()
    def _quantise(self, part: Quantise, descriptor: int, offsets: dict[str, int]) -> TensorError:
        linear, error = quantise_linear(self._weight(part), part.scheme, TORCH_DTYPES[part.scale_dtype])
        for output, tensor in zip(part.outputs(), _stored_tensors(linear, part), strict=True):
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            assert raw.nbytes == output.num_bytes, "the plan and the tensor differ"
            write_at(descriptor, raw.data, offsets[output.name])
        self._shards[part.source.file].release(part.source, matrix_block(part.source.shape, part.index))
        return TensorError(name=part.name, sqnr_db=error.sqnr_db, **asdict(error))

    def _weight(self, part: Quantise) -> Tensor:
        """Return the source's weight [F, D] in float32; CheckpointError for NaN or an infinity."""
        columns = None if part.columns is None else range(*part.columns)
        block = matrix_block(part.source.shape, part.index, columns=columns)
        matrix = self._shards[part.source.file].matrix(part.source, block)
        weight_FD = (matrix if part.index is None else matrix.T).float().contiguous()
        if not weight_FD.isfinite().all():
            raise fault(part.source.file, "holds NaN or an infinity: the file is damaged", tensor=part.source.name)
        return weight_FD

    def _write_the_rest(self, scheme: Scheme) -> None:
        for name in sorted(os.listdir(self._source)):
            if name.endswith(COPIED) and name not in _NOT_COPIED and (self._source / name).is_file():
                copy_whole(self._source, self._out, name)
        if not self._is_single:
            write_whole(self._out, INDEX, _json(self._index()))
        config = parse_object(read_small_file(self._source, CONFIG), CONFIG)
        raw = _json(config | {KEY: scheme_json(scheme, self._plan.ignore)})
        digests = {name: record.sha256 for name, record in self._journal.shards.items()}
        digests[CONFIG] = hashlib.sha256(raw).hexdigest()
        write_whole(self._out, MANIFEST, "".join(f"{d}  {name}\n" for name, d in sorted(digests.items())).encode())
        write_journal(self._out, REPORT, self._journal)
        write_whole(self._out, CONFIG, raw)
        (self._out / PARTIAL_JOURNAL).unlink(missing_ok=True)

    def _index(self) -> dict[str, Any]:
        outputs = [output for shard in self._plan.shards for output in shard.outputs()]
        return {
            "metadata": {"total_size": sum(output.num_bytes for output in outputs)},
            "weight_map": self._plan.weight_map(),
        }

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(self._done, self._total)


def _stored_tensors(linear: QuantisedLinear, part: Quantise) -> list[Tensor]:
    tensors = [linear.stored, linear.scales_FG]
    return [*tensors, torch.tensor(part.shape)] if part.scheme.is_packed else tensors


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
