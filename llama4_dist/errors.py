"""The one tree of errors a caller may catch; knows neither status codes nor transports.

Every error carries a closed `reason` (UPPER_SNAKE, AIP-193) beside its message, so that all faces report it alike.
A message names the thing, the value and the remedy; it never holds a path, an address or a traceback of the server
unless the error is about a file the caller named (`CheckpointError`, `ConfigError`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Llama4Error(Exception):
    """Base of all errors of this project."""

    reason = "ENGINE_ERROR"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s


class EngineError(Llama4Error):
    """The engine failed in a way that is our own fault; the request may be retried elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One request field that was refused, with the reason in words."""

    field: str
    description: str


class InvalidRequestError(Llama4Error):
    """One or more fields of a request are wrong; `violations` names each."""

    reason = "FIELD_INVALID"

    def __init__(self, violations: Sequence[FieldViolation], *, reason: str | None = None) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations), reason=reason)
        self.violations = tuple(violations)


class UnsupportedError(Llama4Error):
    """A feature or modality that this build or this checkpoint does not have."""

    reason = "FEATURE_UNSUPPORTED"


class NotFoundError(Llama4Error):
    """No such model, request or operation."""

    reason = "NOT_FOUND"


class DuplicateRequestError(Llama4Error):
    """A different request with the same id is running."""

    reason = "DUPLICATE_REQUEST"


class OverloadedError(Llama4Error):
    """The queue is full; `retry_after_s` says when to come back."""

    reason = "QUEUE_FULL"


class UnavailableError(Llama4Error):
    """Nothing can serve this now (loading, draining, no live replica of an expert); retriable."""

    reason = "UNAVAILABLE"


class ConflictError(Llama4Error):
    """Another change is under way; `metadata["operation"]` names it. Wait for it or cancel it."""

    reason = "OPERATION_IN_PROGRESS"


class PreconditionError(Llama4Error):
    """The cluster cannot be brought into the state asked for; the message says why and what would work."""

    reason = "INSUFFICIENT_CAPACITY"


class RequestCancelledError(Llama4Error):
    """The caller cancelled."""

    reason = "CANCELLED"


class DeadlineExceededError(Llama4Error):
    """The deadline passed before the request finished."""

    reason = "DEADLINE_EXCEEDED"


class UnauthenticatedError(Llama4Error):
    """No credential, or a wrong one."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(Llama4Error):
    """The credential does not cover this method."""

    reason = "PERMISSION_DENIED"


class ConfigError(Llama4Error):
    """A setting is wrong; the message names the field and the remedy."""

    reason = "CONFIG_INVALID"


class CheckpointError(Llama4Error):
    """A checkpoint file is missing, damaged or of another shape; `file` and `tensor` say which."""

    reason = "CHECKPOINT_INVALID"

    def __init__(self, message: str, *, file: str = "", tensor: str = "") -> None:
        super().__init__(message, metadata={"file": file, "tensor": tensor})
        self.file = file
        self.tensor = tensor


class LinkDownError(Llama4Error):
    """The peer of a link is gone; every row it owes must be asked for again elsewhere."""

    reason = "LINK_DOWN"


class FrameError(LinkDownError):
    """The peer sent bytes that are no valid frame; only this link is closed. `reason` is the code of the defect."""

    reason = "FRAME_INVALID"


class HandshakeError(LinkDownError):
    """The peer could not prove the cluster secret, or runs another model, protocol or geometry."""

    reason = "HANDSHAKE_FAILED"
