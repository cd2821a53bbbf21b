"""Finds the shards of a checkpoint directory and which tensor lies where; opens nothing but safetensors.

Either one `model.safetensors`, or `model.safetensors.index.json` with the shards it names. Pickled weights
(`.bin`, `.pt`, `.pth`, `.ckpt`, `.pt2`) can run code when read, so there is no fallback to them: where they stand in
for missing safetensors they are the error, and beside a complete set they are reported and left alone.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama4_dist.checkpoint.directory import check_directory, has_file, is_plain_name, open_file, read_small_file
from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.header import TensorEntry, read_header
from llama4_dist.checkpoint.strict_json import parse_object

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARDS = 10_000
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pt2")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIdentity:
    """What tells that a file is still the one whose header was checked."""

    num_bytes: int
    inode: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> "ShardIdentity":
        status = os.fstat(descriptor)
        return cls(num_bytes=status.st_size, inode=status.st_ino, modified_ns=status.st_mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Every tensor of the checkpoint by its stored name, and the shards by file name."""

    entries: Mapping[str, TensorEntry]
    shards: Mapping[str, ShardIdentity]
    unlisted: frozenset[str]  # tensors in shards that the index file does not list


def read_index(directory: Path) -> Index:
    """Read the index and every shard's header; raise CheckpointError for whatever does not agree."""
    check_directory(directory)
    pickled = sorted(name for name in os.listdir(directory) if name.lower().endswith(_PICKLED))
    weight_map = _weight_map(directory, pickled)
    entries: dict[str, TensorEntry] = {}
    shards: dict[str, ShardIdentity] = {}
    for name in sorted(set(weight_map.values())) or [SINGLE]:
        if not has_file(directory, name):
            beside = f"; {pickled[0]} is no substitute, pickles are never read" if pickled else ""
            raise fault(name, f"is named by {INDEX} but missing from the checkpoint directory{beside}")
        with open_file(directory, name) as file:
            shards[name] = ShardIdentity.of(file.fileno())
            _merge(entries, read_header(file, name))
    _check_listed(weight_map, entries)
    for name in pickled:
        log.warning("checkpoint_file_ignored file=%s reason=pickled", ascii(name))
    unlisted = frozenset(entries.keys() - weight_map.keys()) if weight_map else frozenset()
    return Index(entries=entries, shards=shards, unlisted=unlisted)


def _weight_map(directory: Path, pickled: list[str]) -> dict[str, str]:
    """Return tensor → file name as the index file states it; empty for a checkpoint of one file."""
    if has_file(directory, INDEX):
        if has_file(directory, SINGLE):
            raise fault(INDEX, f"stands beside {SINGLE}: remove the one that is not the checkpoint")
        return _parse_weight_map(read_small_file(directory, INDEX))
    if has_file(directory, SINGLE):
        return {}
    if pickled:
        raise fault(pickled[0], "is a pickled checkpoint: convert it to safetensors; pickles are never read")
    raise fault(str(directory), f"holds neither {SINGLE} nor {INDEX}")


def _parse_weight_map(raw: bytes) -> dict[str, str]:
    weight_map = parse_object(raw, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(INDEX, "has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise fault(INDEX, f"is assigned to {shown(name)}, which is no safetensors file", tensor=tensor)
        if not is_plain_name(name):
            raise fault(INDEX, f"is assigned to {shown(name)}, which is no plain file name", tensor=tensor)
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise fault(INDEX, f"names more than {MAX_SHARDS} shards")
    return weight_map


def _merge(entries: dict[str, TensorEntry], shard: Mapping[str, TensorEntry]) -> None:
    for tensor, entry in shard.items():
        if tensor in entries:
            raise fault(entry.file, f"is stored a second time; {entries[tensor].file} holds it too", tensor=tensor)
        entries[tensor] = entry


def _check_listed(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> None:
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor].file != name:
            raise fault(name, f"is listed for this file in {INDEX}, but the file does not hold it", tensor=tensor)
