"""A call that goes away takes its generation with it."""

import asyncio
import logging
import random
from collections.abc import Iterator

import grpc
import pytest

from llama4_dist.client import AsyncClient, Client
from llama4_dist.errors import DeadlineExceededError, RequestCancelledError
from llama4_dist.request import Sampling
from llama4_dist.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, serving
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(step_s=0.005)


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(engine) as running:
        yield running


def is_idle(served: Served, engine: ScriptedEngine) -> bool:
    gateway = served.gateway
    return engine.num_held == 0 and gateway.generations.num_running == 0 and gateway.admission.in_flight == 0


def test_leaving_a_stream_early_frees_its_sequence(served: Served, engine: ScriptedEngine) -> None:
    with Client(served.address) as client:
        stream = client.stream_generate([1], Sampling(max_tokens=500, n=2))
        next(iter(stream))
        assert engine.num_held == 2
        stream.close()
        wait_until(lambda: is_idle(served, engine), timeout_s=1.0)


def test_cancelling_a_unary_call_frees_its_sequence(served: Served, engine: ScriptedEngine) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(stopping={"max_tokens": 500})
        request.token_ids.ids.append(1)
        call = stub.Generate.future(request)
        wait_until(lambda: engine.num_held == 1)
        call.cancel()
        call.cancel()
        assert call.code() is grpc.StatusCode.CANCELLED
        wait_until(lambda: is_idle(served, engine), timeout_s=1.0)


def test_a_vanished_connection_frees_its_sequences(served: Served, engine: ScriptedEngine) -> None:
    client = Client(served.address)
    streams = [client.stream_generate([1], Sampling(max_tokens=500)) for _ in range(5)]
    for stream in streams:
        next(iter(stream))
    client.close()
    wait_until(lambda: is_idle(served, engine), timeout_s=1.0)
    with pytest.raises(RequestCancelledError):
        list(streams[0])


def test_a_deadline_ends_the_call_and_frees_its_sequence(served: Served, engine: ScriptedEngine) -> None:
    with Client(served.address) as client:
        with pytest.raises(DeadlineExceededError):
            client.generate([1], Sampling(max_tokens=500), timeout_s=0.1)
        wait_until(lambda: is_idle(served, engine), timeout_s=1.0)
        assert 0 < (engine.submitted[-1].timeout_s or 0) <= 0.101  # a deadline travels in whole milliseconds


async def test_a_cancel_storm_leaves_nothing_behind(
    served: Served, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """1000 requests, half of them cancelled at a random token; the others get exactly their tokens."""
    rng = random.Random(7)
    plans = [(index, rng.randrange(1, 20) if index % 2 else None) for index in range(1000)]
    base_tasks = served.num_tasks()
    gate = asyncio.Semaphore(128)

    async def one(client: AsyncClient, index: int, cancel_at: int | None) -> None:
        async with gate:
            stream = client.stream_generate([index % 300], Sampling(max_tokens=20))
            received: list[int] = []
            async for delta in stream:
                received.extend(delta.token_ids)
                if cancel_at is not None and len(received) >= cancel_at:
                    await stream.close()
                    return
            assert tuple(received) == expected_tokens([index % 300], 20)

    async with AsyncClient(served.address) as client:
        await asyncio.gather(*(one(client, index, cancel_at) for index, cancel_at in plans))
        await asyncio.to_thread(wait_until, lambda: is_idle(served, engine), timeout_s=2.0)
        await asyncio.to_thread(wait_until, lambda: served.num_tasks() <= base_tasks + 2, timeout_s=2.0)
    # A cluster that an earlier test closed may still say that it could not start a worker.
    ours = [record for record in caplog.records if not record.name.startswith("cluster.")]
    assert not [record for record in ours if record.levelno >= logging.WARNING], caplog.text
