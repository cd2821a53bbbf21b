"""Opens the files of a checkpoint directory; only regular files that belong to it, and never by blocking.

A file name from an index is a stranger's: it may not leave the directory, neither by `..` nor through a symbolic link.
The one layout in which links point elsewhere by design is the Hugging Face cache (`snapshots/REVISION/FILE` →
`blobs/HASH`, both under one repository folder), and it is allowed.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from llama4_dist.checkpoint.fault import fault, shown

MAX_SMALL_FILE_BYTES = 25_000_000
BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own


def check_directory(directory: Path) -> None:
    """Raise CheckpointError unless `directory` is a readable directory."""
    try:
        os.listdir(directory)
    except OSError as error:
        raise fault(str(directory), f"cannot be read as a checkpoint directory ({error.strerror})") from None


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file of the directory itself, on any system."""
    return name == os.path.basename(name) and name not in {"", ".", ".."} and "\0" not in name and "\\" not in name


def open_file(directory: Path, name: str) -> BinaryIO:
    """Open the regular file `name` of `directory` for reading, unbuffered; a FIFO or device raises and never blocks."""
    if not is_plain_name(name):
        raise fault(shown(name), "is no plain file name: a checkpoint's files lie in its own directory")
    path = directory / name
    try:
        target = path.resolve(strict=True)
        if not _belongs(target, directory):
            raise fault(name, "is a link to a file outside the checkpoint directory: copy the file into it")
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise fault(name, "is missing from the checkpoint directory") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a symbolic link loop
        raise fault(name, f"cannot be opened ({shown(str(getattr(error, 'strerror', error)))})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise fault(name, "is no regular file: pipes, devices and directories are refused")
    return open(descriptor, "rb", buffering=0)


def read_exactly(file: BinaryIO, num_bytes: int, name: str) -> bytes:
    """Read `num_bytes` from the file's position; the caller has bounded the number."""
    parts: list[bytes] = []
    missing = num_bytes
    while missing:
        try:
            part = file.read(missing)
        except OSError as error:
            raise fault(name, f"cannot be read ({error.strerror})") from None
        if not part:
            raise fault(name, f"ends {missing} bytes early: download the file again")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def read_small_file(directory: Path, name: str) -> bytes:
    """Return the bytes of a file of at most `MAX_SMALL_FILE_BYTES`."""
    with open_file(directory, name) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > MAX_SMALL_FILE_BYTES:
            raise fault(name, f"has {num_bytes} bytes; at most {MAX_SMALL_FILE_BYTES} are read")
        return read_exactly(file, num_bytes, name)


def has_file(directory: Path, name: str) -> bool:
    """Whether `name` exists in any form, a dangling link included."""
    return os.path.lexists(directory / name)


def allocated_bytes(path: Path) -> int:
    """Bytes of disk that a file really takes; fewer than it is long where it has holes."""
    return path.stat().st_blocks * BLOCK_BYTES


def _belongs(target: Path, directory: Path) -> bool:
    home = directory.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    return any(target.is_relative_to(root) for root in homes)
