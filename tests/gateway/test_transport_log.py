"""What gRPC logs by itself, and what of it reaches an operator."""

import logging
from collections.abc import Iterator

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # it is compiled and has no stub

from llama4_dist.gateway.transport_log import TRANSPORT_LOGGER, quieten_lost_statuses
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import serving

transport = logging.getLogger(TRANSPORT_LOGGER)


@pytest.fixture(scope="module", autouse=True)
def a_gateway_was_built() -> Iterator[None]:
    with serving(ScriptedEngine()):
        yield


def log_failure(operation: str) -> None:
    """Log as gRPC does when an operation of a call cannot be carried out."""
    try:
        raise cygrpc.ExecuteBatchError(f'Failed "execute_batch": (<grpc._cython.cygrpc.{operation} object at 0x7f>,)')
    except cygrpc.ExecuteBatchError:
        transport.exception("ExecuteBatchError raised in core by servicer method [/Service/Method]")


def test_a_status_that_finds_no_caller_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        log_failure("SendStatusFromServerOperation")
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert "/Service/Method" in caplog.text


def test_other_failures_of_the_transport_stay_errors(caplog: pytest.LogCaptureFixture) -> None:
    log_failure("ReceiveMessageOperation")
    transport.error("something else")
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.ERROR]


def test_many_gateways_in_one_process_filter_once() -> None:
    before = len(transport.filters)
    quieten_lost_statuses()
    assert len(transport.filters) == before == 1
