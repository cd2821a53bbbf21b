"""Words every checkpoint error the same way: one line that names the file, the tensor and the cause."""

import reprlib

from llama4_dist.errors import CheckpointError

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


def fault(file: str, cause: str, *, tensor: str = "") -> CheckpointError:
    """Return the error for `file` (and one tensor of it). Values from the file enter `cause` through `shown`."""
    subject = f"{file}: tensor {shown(tensor)}" if tensor else f"{file}:"
    return CheckpointError(f"{subject} {cause}", file=file, tensor=tensor)


def shown(value: object) -> str:
    """Return a value from a hostile file so that it fits a line and cannot break one."""
    return ascii(value) if isinstance(value, str) and len(value) <= 120 else ascii(_REPR.repr(value))[1:-1]
