"""Lets an event loop ask a blocking control plane: a few threads, a deadline, an end; knows neither gRPC nor Ray."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from llama4_dist.errors import UnavailableError

Answer = TypeVar("Answer")
RETRY_AFTER_S = 1.0


class AdminCalls:
    """The threads in which calls block, and the news that the server closes."""

    def __init__(self, *, num_threads: int, timeout_s: float) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="admin")
        self._timeout_s = timeout_s
        self._closing = asyncio.Event()

    async def ask(self, function: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
        """Call in a thread; UnavailableError says when to come back, also when no answer comes in time.

        A call that is given up may still be carried out: changes are safe to repeat by their request id.
        """
        if self._closing.is_set():
            raise shutting_down()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await loop.run_in_executor(self._pool, partial(function, *arguments, **named))
        except UnavailableError as error:
            if error.retry_after_s is not None:
                raise
            raise UnavailableError(
                error.message, reason=error.reason, metadata=error.metadata, retry_after_s=RETRY_AFTER_S
            ) from error
        except TimeoutError:
            if not limit.expired():
                raise
            raise UnavailableError(
                f"the controller gave no answer in {self._timeout_s} s: ask again", retry_after_s=RETRY_AFTER_S
            ) from None

    async def pause(self, seconds: float) -> None:
        """Wait; UnavailableError as soon as the server closes, so that a stream ends with a reason."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise shutting_down()

    def close(self) -> None:
        """End every pause and refuse new calls; what was asked still gets its answer."""
        self._closing.set()
        self._pool.shutdown(wait=False)


def shutting_down() -> UnavailableError:
    """Build the error of a call that the server will not answer any more."""
    return UnavailableError("the server is shutting down", reason="DRAINING", retry_after_s=RETRY_AFTER_S)
