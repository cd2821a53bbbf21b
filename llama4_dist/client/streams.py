"""A generation as it comes, blocking and for asyncio: iterates over what is new, across all attempts it takes."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

import grpc

from llama4_dist.client.endpoints import Endpoints
from llama4_dist.client.progress import Progress, StreamMessage
from llama4_dist.client.results import Delta
from llama4_dist.client.retry import is_lost
from llama4_dist.request import Completion
from llama4_dist.rpc import status

OpenCall = Callable[[Any, StreamMessage], Any]


class StreamProgress:
    """What both streams know of their request."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def request_id(self) -> str:
        """The request's id; "" before the first delta."""
        return self._progress.assembler.request_id

    @property
    def seed(self) -> int | None:
        """The seed in use; None before the request has begun. With it the request repeats exactly."""
        return self._progress.seed

    @property
    def completion(self) -> Completion:
        """The whole answer; EngineError before the stream's end."""
        return self._progress.assembler.completion


class CompletionStream(StreamProgress):
    """Iterates over deltas; `completion` is the whole answer once they are exhausted. Leaving early cancels."""

    def __init__(self, endpoints: Endpoints, method: str, progress: Progress, open_call: OpenCall) -> None:
        super().__init__(progress)
        self._deltas = self._run(endpoints, method, progress, open_call)

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def close(self) -> None:
        """Cancel the request if it still runs."""
        self._deltas.close()

    def _run(
        self, endpoints: Endpoints, method: str, progress: Progress, open_call: OpenCall
    ) -> Generator[Delta, None, None]:
        while True:
            endpoint = endpoints.current
            call = open_call(getattr(endpoint.inference, method), progress.message)
            try:
                for event in call:
                    delta = progress.feed(event)
                    if delta is not None:
                        yield delta
                return
            except grpc.RpcError as failure:
                error = status.from_rpc_error(failure)
            finally:
                call.cancel()
            if is_lost(error):
                endpoints.pass_over(endpoint)
            time.sleep(progress.after(error))


class AsyncCompletionStream(StreamProgress):
    """Iterates over deltas; `completion` is the whole answer once they are exhausted. Leaving early cancels."""

    def __init__(self, endpoints: Endpoints, method: str, progress: Progress, open_call: OpenCall) -> None:
        super().__init__(progress)
        self._deltas = self._run(endpoints, method, progress, open_call)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas

    async def close(self) -> None:
        """Cancel the request if it still runs."""
        await self._deltas.aclose()

    async def _run(
        self, endpoints: Endpoints, method: str, progress: Progress, open_call: OpenCall
    ) -> AsyncGenerator[Delta, None]:
        while True:
            endpoint = endpoints.current
            call = open_call(getattr(endpoint.inference, method), progress.message)
            try:
                async for event in call:
                    delta = progress.feed(event)
                    if delta is not None:
                        yield delta
                return
            except grpc.RpcError as failure:
                error = status.from_rpc_error(failure)
            finally:
                call.cancel()
            if is_lost(error):
                endpoints.pass_over(endpoint)
            await asyncio.sleep(progress.after(error))
