"""Errors ⇄ gRPC statuses with google.rpc details (AIP-193); the only file that knows status codes.

What a client may read is decided here: errors whose message can name a file or an address are answered with a general
sentence and a correlation id, and so is every exception we did not foresee; the log has the rest.
"""

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from llama4_dist import errors
from llama4_dist.errors import FieldViolation, InvalidRequestError, Llama4Error

log = logging.getLogger(__name__)

DOMAIN = "llama4_dist"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # gRFC A6
# Peers drop trailers above 8 KiB by default, so what a status says is bounded.
MAX_MESSAGE_CHARS = 1024
MAX_VIOLATIONS = 16
MAX_VALUE_CHARS = 256
MAX_DETAILS_BYTES = 16 * 1024
OPERATION_TYPE = "google.longrunning.Operation"
MAX_RETRY_S = 3600.0  # a server cannot put a client to sleep for longer

Code = grpc.StatusCode
# Nearest class in the exception's MRO wins.
CODES: Mapping[type[Llama4Error], grpc.StatusCode] = {
    errors.EngineError: Code.INTERNAL,
    errors.InvalidRequestError: Code.INVALID_ARGUMENT,
    errors.UnsupportedError: Code.UNIMPLEMENTED,
    errors.NotFoundError: Code.NOT_FOUND,
    errors.DuplicateRequestError: Code.ALREADY_EXISTS,
    errors.OverloadedError: Code.RESOURCE_EXHAUSTED,
    errors.UnavailableError: Code.UNAVAILABLE,
    errors.ConflictError: Code.ABORTED,
    errors.PreconditionError: Code.FAILED_PRECONDITION,
    errors.RequestCancelledError: Code.CANCELLED,
    errors.DeadlineExceededError: Code.DEADLINE_EXCEEDED,
    errors.UnauthenticatedError: Code.UNAUTHENTICATED,
    errors.PermissionDeniedError: Code.PERMISSION_DENIED,
    errors.ConfigError: Code.FAILED_PRECONDITION,
    errors.CheckpointError: Code.DATA_LOSS,
    errors.LinkDownError: Code.UNAVAILABLE,
    Llama4Error: Code.INTERNAL,
}
# A reason that says more than a class without a code of its own (INTERNAL).
CODES_BY_REASON: Mapping[str, grpc.StatusCode] = {
    "WORKER_LOST": Code.ABORTED,
    "OPERATION_IN_PROGRESS": Code.ABORTED,
    "INSUFFICIENT_CAPACITY": Code.FAILED_PRECONDITION,
}
CLASSES: Mapping[grpc.StatusCode, type[Llama4Error]] = {
    Code.INTERNAL: errors.EngineError,
    Code.UNKNOWN: errors.EngineError,
    Code.ABORTED: errors.EngineError,
    Code.DATA_LOSS: errors.EngineError,
    Code.UNIMPLEMENTED: errors.UnsupportedError,
    Code.NOT_FOUND: errors.NotFoundError,
    Code.ALREADY_EXISTS: errors.DuplicateRequestError,
    Code.RESOURCE_EXHAUSTED: errors.OverloadedError,
    Code.UNAVAILABLE: errors.UnavailableError,
    Code.FAILED_PRECONDITION: errors.PreconditionError,
    Code.CANCELLED: errors.RequestCancelledError,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    Code.UNAUTHENTICATED: errors.UnauthenticatedError,
    Code.PERMISSION_DENIED: errors.PermissionDeniedError,
}
# ABORTED says less than its reason: a worker that was lost is no conflict.
CLASSES_BY_REASON: Mapping[tuple[grpc.StatusCode, str], type[Llama4Error]] = {
    (Code.ABORTED, "OPERATION_IN_PROGRESS"): errors.ConflictError,
}
# Their messages may name files, addresses or internals.
PRIVATE = (errors.EngineError, errors.ConfigError, errors.CheckpointError, errors.LinkDownError)


def code_of_reason(reason: str) -> grpc.StatusCode:
    """Return the code of an error of which only the reason is left, as a record keeps it."""
    by_class = (code for kind, code in CODES.items() if kind.reason == reason)
    return CODES_BY_REASON.get(reason) or next(by_class, Code.INTERNAL)


def code_of(error: Llama4Error) -> grpc.StatusCode:
    """Return the status code of an error."""
    code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
    return CODES_BY_REASON.get(error.reason, code) if code is Code.INTERNAL else code


def public(error: Exception) -> Llama4Error:
    """Return what a client may read of `error`; log the rest under a correlation id."""
    if isinstance(error, Llama4Error) and not isinstance(error, PRIVATE):
        return error
    correlation_id = uuid.uuid4().hex
    log.error("request_failed correlation_id=%s", correlation_id, exc_info=error)
    hidden = Llama4Error if not isinstance(error, Llama4Error) else type(error)
    code = next(CODES[kind] for kind in hidden.__mro__ if kind in CODES)
    # A wrong setting or a damaged file of ours is nothing a caller could put right: only absence passes.
    shown = errors.UnavailableError if code is Code.UNAVAILABLE else errors.EngineError
    return shown(
        f"the server failed to answer; its log has the cause under correlation id {correlation_id}",
        reason=error.reason if isinstance(error, Llama4Error) else "ENGINE_ERROR",
        metadata={"correlation_id": correlation_id},
    )


def to_status(error: Llama4Error) -> status_pb2.Status:
    """Build the google.rpc.Status of an error that `public` let through."""
    status = status_pb2.Status(code=code_of(error).value[0], message=clip(error.message, MAX_MESSAGE_CHARS))
    for detail in details_of(error):
        status.details.append(pack(detail))
    return status


def trailing_metadata(error: Llama4Error, status: status_pb2.Status) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailers of a status: its details, and the push-back a retrying client obeys."""
    details: tuple[tuple[str, str | bytes], ...] = ((DETAILS_KEY, status.SerializeToString()),)
    if error.retry_after_s is None:
        return details
    return (*details, (PUSHBACK_KEY, str(max(1, round(error.retry_after_s * 1000)))))


def details_of(error: Llama4Error) -> list[message.Message]:
    """List the details: ErrorInfo always, the others where they have something to say."""
    metadata = {lower_camel(key): clip(str(value), MAX_VALUE_CHARS) for key, value in error.metadata.items()}
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    if isinstance(error, InvalidRequestError):
        details.append(bad_request(error.violations[:MAX_VIOLATIONS]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(round(error.retry_after_s * 1e6))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, errors.PreconditionError):
        details.append(precondition_failure(error))
    if (resource := resource_info(error)) is not None:
        details.append(resource)
    return details


def resource_info(error: Llama4Error) -> Any:
    """Build the ResourceInfo detail of an error that names a resource; None for the others."""
    kind, name = error.metadata.get("resource_type", ""), error.metadata.get("resource_name", "")
    if isinstance(error, errors.ConflictError) and "operation" in error.metadata:
        kind, name = OPERATION_TYPE, error.metadata["operation"]
    if not name:
        return None
    return error_details_pb2.ResourceInfo(resource_type=kind, resource_name=clip(name, MAX_VALUE_CHARS))


def precondition_failure(error: errors.PreconditionError) -> Any:
    """Build the PreconditionFailure detail: which condition, of what, and what would meet it."""
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=clip(error.reason, MAX_VALUE_CHARS),
        subject=clip(error.metadata.get("subject", "cluster"), MAX_VALUE_CHARS),
        description=clip(error.message, MAX_MESSAGE_CHARS),
    )
    return error_details_pb2.PreconditionFailure(violations=[violation])


def bad_request(violations: Sequence[FieldViolation]) -> Any:
    """Build the BadRequest detail."""
    described = [
        error_details_pb2.BadRequest.FieldViolation(
            field=clip(violation.field, MAX_VALUE_CHARS), description=clip(violation.description, MAX_VALUE_CHARS)
        )
        for violation in violations
    ]
    return error_details_pb2.BadRequest(field_violations=described)


def pack(detail: message.Message) -> any_pb2.Any:
    """Wrap a detail."""
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def from_rpc_error(error: grpc.RpcError) -> Llama4Error:
    """Turn a failed call into our error; a status without our ErrorInfo gets the reason TRANSPORT."""
    code, text = error.code(), error.details() or ""
    metadata: Any = error.trailing_metadata() or ()  # pairs, in the sync and the asyncio API alike
    trailers: dict[str, str | bytes] = dict(metadata)
    status = status_pb2.Status()
    packed = trailers.get(DETAILS_KEY, b"")
    if isinstance(packed, bytes) and len(packed) <= MAX_DETAILS_BYTES:
        try:
            status.ParseFromString(packed)
        except message.DecodeError:
            status.Clear()
    return from_status(code, text, status, trailers.get(PUSHBACK_KEY))


def from_status(
    code: grpc.StatusCode, text: str, status: status_pb2.Status, pushback_ms: str | bytes | None = None
) -> Llama4Error:
    """Build our error from a code, its text and its details."""
    info = find(status, error_details_pb2.ErrorInfo())
    retry = find(status, error_details_pb2.RetryInfo())
    retry_after_s = retry.retry_delay.ToMilliseconds() / 1000 if retry is not None else None
    if isinstance(pushback_ms, str) and re.fullmatch(r"[0-9]+", pushback_ms):
        retry_after_s = int(pushback_ms[:12]) / 1000
    if retry_after_s is not None:
        retry_after_s = min(max(retry_after_s, 0.0), MAX_RETRY_S)
    reason = info.reason if info is not None and info.domain == DOMAIN else "TRANSPORT"
    if code in (Code.INVALID_ARGUMENT, Code.OUT_OF_RANGE):
        bad = find(status, error_details_pb2.BadRequest())
        found = bad.field_violations if bad is not None else ()
        violations = [FieldViolation(field=item.field, description=item.description) for item in found]
        return InvalidRequestError(violations or [FieldViolation(field="request", description=text)], reason=reason)
    metadata = {snake(key): value for key, value in info.metadata.items()} if info is not None else {}
    kind = CLASSES_BY_REASON.get((code, reason), CLASSES.get(code, errors.EngineError))
    return kind(text or code.name, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


def find(status: status_pb2.Status, wanted: Any) -> Any:
    """Return the detail of `wanted`'s type (a generated message), parsed into it, or None."""
    for detail in status.details:
        if detail.Is(wanted.DESCRIPTOR):
            try:
                detail.Unpack(wanted)
            except message.DecodeError:
                return None
            return wanted
    return None


def clip(text: str, limit: int) -> str:
    """Bound a string, and keep it on one printable line."""
    printable = "".join(character if character.isprintable() else " " for character in text[: limit + 1])
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


def lower_camel(name: str) -> str:
    """`retry_after` → `retryAfter`, as AIP-193 wants metadata keys."""
    return re.sub(r"_([a-z0-9])", lambda found: found.group(1).upper(), name)


def snake(name: str) -> str:
    """Undo `lower_camel`."""
    return re.sub(r"([A-Z])", lambda found: "_" + found.group(1).lower(), name)
