"""Keeps gRPC's own log to what an operator can act on: a caller that left is no error of the server."""

import logging

import grpc

TRANSPORT_LOGGER = "grpc._cython.cygrpc"

log = logging.getLogger(__name__)


def quieten_lost_statuses() -> None:
    """Report statuses that found no caller at DEBUG; once or often, it makes no difference."""
    logging.getLogger(TRANSPORT_LOGGER).addFilter(is_worth_an_error)


def is_worth_an_error(record: logging.LogRecord) -> bool:
    """Tell a defect from a race that every server loses now and then.

    A call that is cancelled while its last status is on the way makes gRPC log an error with a traceback
    (grpc/grpc#32551). Only the caller could have seen the status, and the caller is gone.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, grpc.aio.InternalError) and "SendStatusFromServerOperation" in str(error):
        log.debug("status_found_no_caller call=%s", record.getMessage())
        return False
    return True
