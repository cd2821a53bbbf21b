"""Reads a tokenizer file within a size limit, checked before any byte is read."""

import stat
from pathlib import Path

from llama4_dist.errors import CheckpointError

MAX_FILE_BYTES = 64 * 1024 * 1024  # Llama 4's tokenizer.json has 28 MB, its tokenizer.model 3.6 MB


def read_bounded(path: Path) -> bytes:
    """Return the file's bytes; CheckpointError unless it is a readable regular file of at most MAX_FILE_BYTES."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise broken(path, "is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise broken(path, f"has {status.st_size} bytes; at most {MAX_FILE_BYTES} are allowed")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise broken(path, f"cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise broken(path, f"grew beyond {MAX_FILE_BYTES} bytes while it was read")
    return content


def broken(path: Path, problem: str) -> CheckpointError:
    """Return the error for a defect of a tokenizer file."""
    return CheckpointError(f"{path.name}: {problem}", file=str(path))
