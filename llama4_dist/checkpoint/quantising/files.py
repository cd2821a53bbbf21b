"""Puts files into a folder so that a name stands for a whole file or for nothing, whatever ends the process, and when.

A file is written under another name, synced, and renamed. What a full disk stops is removed again.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llama4_dist.checkpoint.directory import open_file
from llama4_dist.errors import PreconditionError

PARTIAL = ".partial"  # behind the name of a file that is not whole
CHUNK_BYTES = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Advance = Callable[[int], None]


@contextmanager
def whole_file(folder: Path, name: str, num_bytes: int = 0) -> Iterator[int]:
    """Yield a descriptor to write to; the file gets its name when the block ends well. `num_bytes` are taken first.

    Raise PreconditionError (DISK_FULL, DISK_ERROR) where it cannot be written.
    """
    partial = folder / (name + PARTIAL)
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            if num_bytes:
                os.posix_fallocate(descriptor, 0, num_bytes)
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, folder / name)
        sync_folder(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _write_error(folder, name, num_bytes, error) from error


def write_whole(folder: Path, name: str, content: bytes) -> None:
    """Write a small file."""
    with whole_file(folder, name, len(content)) as descriptor:
        write_at(descriptor, content, 0)


def copy_whole(source: Path, folder: Path, name: str) -> None:
    """Copy file `name` of another folder."""
    with open_file(source, name) as file, whole_file(folder, name) as descriptor:
        position = 0
        while chunk := file.read(CHUNK_BYTES):
            write_at(descriptor, chunk, position)
            position += len(chunk)


def write_at(descriptor: int, content: bytes | memoryview, position: int) -> None:
    """Write all of `content` at a position."""
    rest = memoryview(content).cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, position)
        position += written
        rest = rest[written:]


def digest_of(folder: Path, name: str, advance: Advance = lambda num_bytes: None) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_file(folder, name) as file:
        while chunk := _read(file):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(file: BinaryIO) -> bytes:
    return file.read(CHUNK_BYTES)


def _write_error(folder: Path, name: str, num_bytes: int, error: OSError) -> PreconditionError:
    remedy = "run the same command again: what is finished is kept"
    if error.errno in _FULL:
        free = shutil.disk_usage(folder).free
        room = f"{num_bytes:,} bytes are needed, {free:,} are free"
        message = f"{name}: no room in {folder}: {room}; make some and {remedy}"
        return PreconditionError(message, reason="DISK_FULL")
    message = f"{name}: cannot be written to {folder} ({error.strerror}); when that is mended, {remedy}"
    return PreconditionError(message, reason="DISK_ERROR")
