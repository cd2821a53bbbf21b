"""The error of a message between stages that is not as it must be; the link it came by is of no use any more."""

from llama4_dist.errors import FrameError


def defect(reason: str, message: str) -> FrameError:
    """Return the error."""
    return FrameError(message, reason=reason)
