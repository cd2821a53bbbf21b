"""Errors cross the wire with their meaning, and without what is nobody's business."""

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from llama4_dist import errors
from llama4_dist.errors import FieldViolation, InvalidRequestError, Llama4Error
from llama4_dist.rpc import status

Code = grpc.StatusCode
ALL_ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Llama4Error)]


def make(kind: type[Llama4Error]) -> Llama4Error:
    if kind is InvalidRequestError:
        return InvalidRequestError([FieldViolation(field="top_p", description="is 2, above 1")])
    return kind("the message")


class FailedCall(grpc.RpcError):
    """What a client library raises."""

    def __init__(self, error: Llama4Error) -> None:
        built = status.to_status(error)
        self._code, self._text = status.code_of(error), built.message
        self._trailers = status.trailing_metadata(error, built)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> Any:
        return self._trailers


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_has_a_code_and_error_info(kind: type[Llama4Error]) -> None:
    error = make(kind)
    built = status.to_status(error)
    info = status.find(built, error_details_pb2.ErrorInfo())
    assert built.code == status.code_of(error).value[0]
    assert built.code != 0
    assert (info.reason, info.domain) == (error.reason, "llama4_dist")
    kinds = [detail.type_url for detail in built.details]
    assert len(kinds) == len(set(kinds)), "AIP-193: each detail type at most once"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.OverloadedError("x"), Code.RESOURCE_EXHAUSTED),
        (errors.UnavailableError("x", reason="DRAINING"), Code.UNAVAILABLE),
        (errors.EngineError("x"), Code.INTERNAL),
        (errors.EngineError("x", reason="WORKER_LOST"), Code.ABORTED),
        (errors.UnavailableError("x", reason="WORKER_LOST"), Code.UNAVAILABLE),
        (errors.Llama4Error("x", reason="INSUFFICIENT_CAPACITY"), Code.FAILED_PRECONDITION),
        (errors.Llama4Error("x", reason="OPERATION_IN_PROGRESS"), Code.ABORTED),
        (errors.ConflictError("x"), Code.ABORTED),
        (errors.PreconditionError("x"), Code.FAILED_PRECONDITION),
        (errors.FrameError("x"), Code.UNAVAILABLE),
        (errors.CheckpointError("x"), Code.DATA_LOSS),
    ],
)
def test_codes(error: Llama4Error, code: grpc.StatusCode) -> None:
    assert status.code_of(error) is code


@pytest.mark.parametrize("kind", [kind for kind in status.CLASSES.values() if kind is not errors.EngineError])
def test_an_error_comes_back_as_it_went(kind: type[Llama4Error]) -> None:
    sent = kind("a message", reason="SOME_REASON", metadata={"worker_id": "7"}, retry_after_s=1.5)
    read = status.from_rpc_error(FailedCall(sent))
    assert type(read) is kind
    assert (read.message, read.reason) == ("a message", "SOME_REASON")
    assert (dict(read.metadata), read.retry_after_s) == ({"worker_id": "7"}, 1.5)


def test_a_conflict_comes_back_and_names_the_operation_in_its_way() -> None:
    sent = errors.ConflictError("busy", metadata={"operation": "operations/7"})
    read = status.from_rpc_error(FailedCall(sent))
    assert isinstance(read, errors.ConflictError)
    assert read.metadata["operation"] == "operations/7"
    resource = status.find(status.to_status(sent), error_details_pb2.ResourceInfo())
    assert (resource.resource_type, resource.resource_name) == ("google.longrunning.Operation", "operations/7")
    lost = FailedCall(errors.EngineError("x", reason="WORKER_LOST"))
    assert type(status.from_rpc_error(lost)) is errors.EngineError


def test_a_failed_precondition_says_which() -> None:
    sent = errors.PreconditionError("2 hosts of 1 GiB do not hold 3 GiB: ask for 3", metadata={"subject": "memory"})
    failure = status.find(status.to_status(sent), error_details_pb2.PreconditionFailure())
    (violation,) = failure.violations
    assert (violation.type, violation.subject) == ("INSUFFICIENT_CAPACITY", "memory")
    assert violation.description == sent.message


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.CheckpointError, errors.EngineError])
def test_a_defect_of_the_server_is_no_precondition_a_caller_could_meet(kind: type[Llama4Error]) -> None:
    assert status.code_of(status.public(kind("hidden"))) is Code.INTERNAL


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("CANCELLED", Code.CANCELLED),
        ("INSUFFICIENT_CAPACITY", Code.FAILED_PRECONDITION),
        ("WORKER_LOST", Code.ABORTED),
        ("CHECKPOINT_INVALID", Code.DATA_LOSS),
        ("NEVER_HEARD_OF", Code.INTERNAL),
    ],
)
def test_a_recorded_reason_still_has_its_code(reason: str, code: grpc.StatusCode) -> None:
    assert status.code_of_reason(reason) is code


def test_violations_come_back_one_by_one() -> None:
    sent = InvalidRequestError([FieldViolation(field=f"f{index}", description="bad") for index in range(3)])
    read = status.from_rpc_error(FailedCall(sent))
    assert isinstance(read, InvalidRequestError)
    assert read.violations == sent.violations


def test_a_status_stays_below_what_peers_accept_in_trailers() -> None:
    violations = [FieldViolation(field="f" * 5000, description="d" * 5000) for _ in range(1000)]
    built = status.to_status(InvalidRequestError(violations))
    assert len(built.message) <= status.MAX_MESSAGE_CHARS
    assert built.ByteSize() < 12 * 1024
    with_metadata = status.to_status(errors.NotFoundError("m" * 9999, metadata={"resource_name": "n" * 9999}))
    assert with_metadata.ByteSize() < 4096


def test_control_characters_do_not_reach_a_message() -> None:
    assert status.to_status(errors.NotFoundError("a\r\nb\0c\x1b[31m")).message == "a  b c [31m"


@pytest.mark.parametrize(
    "error",
    [
        errors.CheckpointError("/models/scout/x.safetensors is damaged", file="/models/scout/x.safetensors"),
        errors.ConfigError("/etc/tokens"),
        errors.LinkDownError("10.0.0.7:7070 is gone"),
        errors.EngineError("cuda error at 0x7f00"),
        RuntimeError("secret"),
        KeyError("secret"),
    ],
)
def test_private_errors_are_replaced_by_a_correlation_id(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    shown = status.public(error)
    text = f"{status.to_status(shown)} {shown.message} {dict(shown.metadata)}"
    for secret in ("/models", "/etc", "10.0.0.7", "0x7f", "secret"):
        assert secret not in text
    assert shown.metadata["correlation_id"] in caplog.text
    assert str(error).split(":")[-1].strip("'")[:6] in caplog.text


def test_public_errors_pass_as_they_are() -> None:
    error = errors.UnavailableError("come back", retry_after_s=1)
    assert status.public(error) is error


def test_push_back_is_whole_milliseconds_and_never_zero() -> None:
    error = errors.OverloadedError("x", retry_after_s=0.0001)
    assert dict(status.trailing_metadata(error, status.to_status(error)))[status.PUSHBACK_KEY] == "1"


def test_a_status_of_a_stranger_is_read_with_care() -> None:
    foreign = status_pb2.Status()
    foreign.details.append(
        any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff not a message")
    )
    assert status.from_status(Code.UNAVAILABLE, "gone", foreign).reason == "TRANSPORT"
    stranger = status_pb2.Status()
    stranger.details.append(status.pack(error_details_pb2.ErrorInfo(reason="X", domain="other.example")))
    assert status.from_status(Code.NOT_FOUND, "", stranger).reason == "TRANSPORT"
    assert status.from_status(Code.NOT_FOUND, "", stranger).message == "NOT_FOUND"
    assert isinstance(status.from_status(Code.INVALID_ARGUMENT, "no", status_pb2.Status()), InvalidRequestError)
    for pushback in ("-1", "1e9", "²", "soon"):
        assert status.from_status(Code.UNAVAILABLE, "x", status_pb2.Status(), pushback).retry_after_s is None
    assert status.from_status(Code.UNAVAILABLE, "x", status_pb2.Status(), "9" * 9999).retry_after_s == 3600.0
    past = status.to_status(errors.UnavailableError("x", retry_after_s=-5.0))
    assert status.from_status(Code.UNAVAILABLE, "x", past).retry_after_s == 0.0


def test_oversized_or_damaged_details_are_dropped() -> None:
    call = FailedCall(errors.OverloadedError("x", retry_after_s=1))
    for damaged in (b"\xff" * 100, b"\0" * (status.MAX_DETAILS_BYTES + 1)):
        call._trailers = ((status.DETAILS_KEY, damaged),)
        read = status.from_rpc_error(call)
        assert isinstance(read, errors.OverloadedError)
        assert read.retry_after_s is None
