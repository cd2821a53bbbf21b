"""Sends a plan to a gateway at its times, whatever still runs (an open loop), and notes when messages arrive.

While it runs it only notes times and bytes: the messages are read afterwards, so that reading does not delay a note.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from llama4_dist.bench.records import PlannedRequest, RequestRecord
from llama4_dist.client.options import ConnectOptions, channel_credentials, channel_options
from llama4_dist.request import Sampling
from llama4_dist.rpc.status import from_rpc_error
from llama4_dist.rpc.wire import generate_to_proto
from llama4_dist.v1 import inference_pb2

METHOD = "/llama4_dist.v1.InferenceService/StreamGenerate"
OWN_POOL = ("grpc.use_local_subchannel_pool", 1)  # else channels to one address share a connection
OnDone = Callable[[int], None]  # requests done so far


class LoadGenerator:
    """Runs plans against one gateway over `num_connections` connections; an async context manager."""

    def __init__(self, address: str, options: ConnectOptions, *, num_connections: int = 1) -> None:
        self._options = options
        arguments = [*channel_options(options), OWN_POOL]
        credentials = channel_credentials(options) if options.uses_tls else None
        self._channels = [
            grpc.aio.secure_channel(address, credentials, arguments)
            if credentials is not None
            else grpc.aio.insecure_channel(address, arguments)
            for _ in range(num_connections)
        ]
        self._calls: list[Any] = [
            channel.unary_stream(METHOD, response_deserializer=None) for channel in self._channels
        ]

    async def __aenter__(self) -> "LoadGenerator":
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def run(
        self, requests: Sequence[PlannedRequest], *, start_s: float | None = None, on_done: OnDone = lambda number: None
    ) -> list[RequestRecord]:
        """Send every request at its time, counted from `start_s` on the monotonic clock (now); wait for all."""
        bodies = [body(request) for request in requests]
        start_s = time.monotonic() if start_s is None else start_s
        num_done = 0

        async def one(number: int) -> RequestRecord:
            nonlocal num_done
            await asyncio.sleep(start_s + requests[number].at_s - time.monotonic())
            record = await self._send(number, requests[number], bodies[number], start_s)
            num_done += 1
            on_done(num_done)
            return record

        return list(await asyncio.gather(*map(one, range(len(requests)))))

    async def _send(self, number: int, request: PlannedRequest, body: bytes, start_s: float) -> RequestRecord:
        sent_s = time.monotonic()
        arrived: list[tuple[float, bytes]] = []
        error = None
        call: Any = self._calls[number % len(self._calls)](body, metadata=self._options.metadata)
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                arrived.append((time.monotonic() - start_s, message))
            if (code := await call.code()) is not grpc.StatusCode.OK:
                error = code.name
        except grpc.RpcError as failure:
            error = from_rpc_error(failure).reason
        ended_s = time.monotonic()
        return RequestRecord(
            scheduled_s=request.at_s,
            sent_s=sent_s - start_s,
            ended_s=ended_s - start_s,
            prompt_tokens=len(request.prompt_token_ids),
            tokens=tuple((at_s, number) for at_s, message in arrived if (number := num_tokens(message))),
            error=error,
        )


def body(request: PlannedRequest) -> bytes:
    """Encode a request for exactly `output_len` tokens, drawn greedily."""
    sampling = Sampling(max_tokens=request.output_len, temperature=0.0, ignore_eos=True)
    message = generate_to_proto(request.prompt_token_ids, sampling, model="", request_id="", priority=0)
    message.response.return_prompt_token_ids = False
    return inference_pb2.StreamGenerateRequest(request=message).SerializeToString()


def num_tokens(message: bytes) -> int:
    """Count the tokens that a message of the stream brings."""
    return len(inference_pb2.StreamGenerateResponse.FromString(message).delta.token_ids)
