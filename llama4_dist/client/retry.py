"""Decides whether and when a failed call is tried again; pure."""

import random
import time

import grpc

from llama4_dist.client.options import ConnectOptions
from llama4_dist.errors import DeadlineExceededError, EngineError, Llama4Error, OverloadedError, UnavailableError
from llama4_dist.rpc import status

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 5.0


class Attempts:
    """The attempts of one call: what time is left, and how long to wait before the next.

    `num_addresses` gateways are tried in turn, so each waits only for its own turn to come again.
    """

    def __init__(self, options: ConnectOptions, timeout_s: float | None, num_addresses: int = 1) -> None:
        self._max_attempts = options.max_attempts
        self._num_addresses = num_addresses
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

    def progressed(self) -> None:
        """Count anew: the call has given something that it had not given before."""
        self._num_failed = 0

    def delay_s(self, failure: grpc.RpcError, *, begun: bool) -> float:
        """Return the wait before trying a failed call again, or raise the failure as one of our errors."""
        error = status.from_rpc_error(failure)
        return self.delay_after(error, retriable=not begun and may_retry(error))

    def delay_after(self, error: Llama4Error, *, retriable: bool) -> float:
        """Return the wait before trying again, or raise the error."""
        self._num_failed += 1
        if not retriable or self._num_failed >= self._max_attempts:
            raise error from None
        delay_s = wait_s(error, self._num_failed, self._num_addresses)
        if self._deadline_s is not None and time.monotonic() + delay_s >= self._deadline_s:
            raise error from None
        return delay_s


def is_lost(error: Llama4Error) -> bool:
    """Tell whether a server or the way to it failed, so that another server may do what this one did not."""
    broken = isinstance(error, EngineError) and error.reason == "TRANSPORT"
    return isinstance(error, UnavailableError) or error.reason == "WORKER_LOST" or broken


def may_retry(error: Llama4Error) -> bool:
    """Overload and absence pass; a RESOURCE_EXHAUSTED without a hint is a size limit, which does not."""
    return is_lost(error) or (isinstance(error, OverloadedError) and error.retry_after_s is not None)


def wait_s(error: Llama4Error, num_failed: int, num_addresses: int = 1) -> float:
    """Obey the server's push-back; without one back off exponentially. Jitter keeps clients from returning together.

    While there is an address that has not been tried in this round, a server that is away is not waited for.
    """
    jitter = random.uniform(1.0, 1.25)  # noqa: S311 (jitter, no secret)
    if is_lost(error) and num_failed % num_addresses:
        return FIRST_BACKOFF_S / 5 * jitter
    num_rounds = (num_failed - 1) // num_addresses
    backoff_s = min(FIRST_BACKOFF_S * 2**num_rounds, MAX_BACKOFF_S)
    return jitter * (error.retry_after_s if error.retry_after_s is not None else backoff_s)
