"""Decides whether and when a failed call is tried again; pure. Only calls that gave nothing yet may ask."""

import random
import time

import grpc

from llama4_dist.client.options import ConnectOptions
from llama4_dist.errors import DeadlineExceededError, Llama4Error, OverloadedError, UnavailableError
from llama4_dist.rpc import status

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 5.0


class Attempts:
    """The attempts of one call: what time is left, and how long to wait before the next."""

    def __init__(self, options: ConnectOptions, timeout_s: float | None) -> None:
        self._max_attempts = options.max_attempts
        self._num_failed = 0
        limit_s = timeout_s if timeout_s is not None else options.timeout_s
        self._deadline_s = time.monotonic() + limit_s if limit_s is not None else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds for the next attempt; raise DeadlineExceededError when none are left."""
        if self._deadline_s is None:
            return None
        remaining_s = self._deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before the request could be sent")
        return remaining_s

    def delay_s(self, failure: grpc.RpcError, *, begun: bool) -> float:
        """Return the wait before trying again, or raise the failure as one of our errors."""
        error = status.from_rpc_error(failure)
        self._num_failed += 1
        if begun or self._num_failed >= self._max_attempts or not may_retry(error):
            raise error from None
        delay_s = wait_s(error, self._num_failed)
        if self._deadline_s is not None and time.monotonic() + delay_s >= self._deadline_s:
            raise error from None
        return delay_s


def may_retry(error: Llama4Error) -> bool:
    """Overload and absence pass; a RESOURCE_EXHAUSTED without a hint is a size limit, which does not."""
    return isinstance(error, UnavailableError) or (
        isinstance(error, OverloadedError) and error.retry_after_s is not None
    )


def wait_s(error: Llama4Error, num_failed: int) -> float:
    """Obey the server's push-back; without one back off exponentially. Jitter keeps clients from returning together."""
    backoff_s = min(FIRST_BACKOFF_S * 2 ** (num_failed - 1), MAX_BACKOFF_S)
    base_s = error.retry_after_s if error.retry_after_s is not None else backoff_s
    return base_s * random.uniform(1.0, 1.25)  # noqa: S311 (jitter, no secret)
