"""Decides whether a folder may be written to: it is new, or holds the beginning of the very same, and nobody writes."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama4_dist.checkpoint.config_file import CONFIG
from llama4_dist.checkpoint.directory import read_small_file
from llama4_dist.checkpoint.index import Index
from llama4_dist.checkpoint.quantising.journal import PARTIAL_JOURNAL, Journal, read_journal, write_journal
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError, ConflictError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is missing, against another run: ConflictError where there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made or opened ({error.strerror}): choose another folder") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConflictError(f"another run writes to {folder}: wait for it", reason="FOLDER_IN_USE") from None
    finally:
        os.close(descriptor)


def begun(out: Path, wanted: Journal) -> Journal:
    """Return the journal to go on with; ConflictError where the folder holds anything but a beginning of the same."""
    found = read_journal(out)
    if found is None:
        if os.listdir(out):
            raise ConflictError(f"{out} is not empty: choose a new folder", reason="FOLDER_NOT_EMPTY")
        write_journal(out, PARTIAL_JOURNAL, wanted)
        return wanted
    for what, theirs, ours in (
        ("another source", found.source, wanted.source),
        ("other options", found.options, wanted.options),
    ):
        if theirs != json.loads(json.dumps(ours)):
            message = f"{out} was begun with {what}: {_difference(theirs, ours)}; choose a new folder"
            raise ConflictError(message, reason="FOLDER_HOLDS_ANOTHER")
    return found


def _difference(theirs: Any, ours: Any) -> str:
    ours = json.loads(json.dumps(ours))
    key = next(key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key))
    return f"{key} was {theirs.get(key)}, is {ours.get(key)}"


def fingerprint(checkpoint: Checkpoint, index: Index) -> dict[str, Any]:
    """Name the source's bytes without reading them: a file that changes has another size or another time."""
    files = {name: [shard.num_bytes, shard.modified_ns] for name, shard in index.shards.items()}
    config = hashlib.sha256(read_small_file(checkpoint.path, CONFIG)).hexdigest()
    return {"model_hash": checkpoint.model_hash, "config": config, "files": files}
