"""Remembers, beside the new shards, what they are made from and which are finished; a resumed run trusts nothing else.

While shards are missing the journal's name is PARTIAL_JOURNAL; the finished checkpoint carries the same as REPORT.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama4_dist.checkpoint.directory import has_file, read_small_file
from llama4_dist.checkpoint.fault import fault
from llama4_dist.checkpoint.quantising.files import write_whole
from llama4_dist.checkpoint.strict_json import parse_object

REPORT, PARTIAL_JOURNAL = "quantisation.json", "quantisation.partial.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """What one quantised linear lost; see `rounding.RoundingError`."""

    name: str
    largest: float
    relative: float
    sqnr_db: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A finished shard."""

    num_bytes: int
    sha256: str
    errors: tuple[TensorError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """`source` and `options` name everything that the bytes depend on."""

    source: Mapping[str, Any]
    options: Mapping[str, Any]
    shards: Mapping[str, ShardRecord]

    def with_shard(self, name: str, record: ShardRecord) -> "Journal":
        return Journal(source=self.source, options=self.options, shards={**self.shards, name: record})


def read_journal(folder: Path) -> Journal | None:
    """Return what a run before left in `folder`, None where none did; CheckpointError if it is no journal."""
    name = next((name for name in (PARTIAL_JOURNAL, REPORT) if has_file(folder, name)), None)
    if name is None:
        return None
    content = parse_object(read_small_file(folder, name), name)
    try:
        body, seal = content["journal"], content["sha256"]
        if seal != _seal(body):
            raise ValueError("the digest differs")
        shards = {
            shard: ShardRecord(
                num_bytes=record["num_bytes"],
                sha256=record["sha256"],
                errors=tuple(TensorError(**error) for error in record["errors"]),
            )
            for shard, record in body["shards"].items()
        }
        return Journal(source=body["source"], options=body["options"], shards=shards)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise fault(
            name, "is no journal of a quantisation, or was changed: remove the folder and begin again"
        ) from None


def write_journal(folder: Path, name: str, journal: Journal) -> None:
    """Write the journal, whole or not at all."""
    body = json.loads(json.dumps(asdict(journal)))
    write_whole(folder, name, json.dumps({"journal": body, "sha256": _seal(body)}, indent=1).encode() + b"\n")


def _seal(body: Any) -> str:
    """Return a digest against torn and edited journals; it proves no origin."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
