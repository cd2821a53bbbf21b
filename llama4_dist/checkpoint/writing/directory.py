"""Makes a directory that appears whole or not at all: written under another name beside it, renamed at the end.

What the file system refuses is said in words: a full disk, files that are too large, holes that would not be holes.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama4_dist.checkpoint.directory import allocated_bytes
from llama4_dist.errors import ConfigError, Llama4Error, PreconditionError

PROBE_BYTES = 64 * 1024 * 1024


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `out` if the body ends well and is removed if it does not.

    ConfigError where `out` exists and is not empty; PreconditionError (DISK_FULL, FILE_TOO_LARGE) for failed writes.
    """
    check_absent(out)
    stage = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        stage.mkdir()
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}): name another directory") from None
    try:
        yield stage
        sync(stage)
        os.rename(stage, out)
        sync(out.parent)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        raise _in_words(error, out) from error
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def check_absent(out: Path) -> None:
    """Refuse a path that exists, unless it is an empty directory."""
    if os.path.lexists(out) and not (out.is_dir() and not os.listdir(out)):
        raise ConfigError(f"{out} exists and is not empty: name a new directory, or remove it first")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"{out.resolve().parent} is no directory: make it first")


def check_room(directory: Path, num_bytes: int) -> None:
    """Raise PreconditionError (DISK_FULL) unless the file system of `directory` has `num_bytes` free."""
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise PreconditionError(
            f"{num_bytes:,} bytes are to be written and {free:,} are free on the disk of {directory.resolve().parent}: "
            "free some, or choose another disk",
            reason="DISK_FULL",
        )


def check_holes(directory: Path) -> None:
    """Raise PreconditionError (NO_SPARSE_FILES) where a file without bytes takes the disk space of all of them."""
    probe = directory / "probe"
    with probe.open("wb") as file:
        file.truncate(min(PROBE_BYTES, shutil.disk_usage(directory).free // 2))
        os.fsync(file.fileno())
        taken = allocated_bytes(probe)
    probe.unlink()
    if taken > PROBE_BYTES // 16:
        raise PreconditionError(
            f"the file system of {directory.resolve().parent} has no sparse files: holes would take their full size; "
            "choose ext4, xfs, btrfs or tmpfs, or leave --sparse out",
            reason="NO_SPARSE_FILES",
        )


def sync(path: Path) -> None:
    """Bring a file's bytes, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_words(error: OSError, out: Path) -> Llama4Error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message, reason = "the disk (or your share of it) is full: free some, or choose another disk", "DISK_FULL"
    elif error.errno == errno.EFBIG:
        message, reason = "the file system takes no file that large: give a smaller --shard-size", "FILE_TOO_LARGE"
    elif error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        message, reason = "somebody else made it meanwhile: name a new directory", "EXISTS"
    else:
        message, reason = f"{error.strerror or error}: nothing was kept", "WRITE_FAILED"
    return PreconditionError(f"{out} was not written: {message}", reason=reason)
