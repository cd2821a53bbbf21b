"""Too much work is refused quickly, in words a client can act on; a drain lets what runs finish."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import DeadlineExceededError, OverloadedError, UnavailableError
from llama4_dist.gateway.admission import Admission
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from llama4_dist.rpc.status import PUSHBACK_KEY
from llama4_dist.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import serving
from tests.waiting import wait_until

NO_RETRY = ConnectOptions(max_attempts=1)


class Clock:
    """Stands where it is put."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_refused_callers_are_told_times_apart() -> None:
    clock = Clock()
    admission = Admission(1, clock)
    for _ in range(50):  # one call a second ends
        with admission.enter():
            clock.now_s += 1.0
    with admission.enter():
        waits = []
        for _ in range(3):
            with pytest.raises(OverloadedError) as refused, admission.enter():
                pass
            waits.append(refused.value.retry_after_s or 0)
    assert waits == pytest.approx([waits[0], 2 * waits[0], 3 * waits[0]])
    assert waits[0] == pytest.approx(1.0, rel=0.05)
    assert admission.in_flight == 0


async def test_who_would_wait_too_long_is_refused_and_who_would_not_is_let_in() -> None:
    """Ten begin a second, so with a bound of a second ten may wait; one more begins, and one more may come."""
    clock = Clock()
    admission = Admission(1000, clock, max_queue_s=1.0)
    with ExitStack() as held:
        began = [held.enter_context(admission.enter()) for _ in range(60)]
        for begin in began[:50]:
            clock.now_s += 0.1
            begin()
        assert admission.in_flight == 60
        held.enter_context(admission.enter())
        with pytest.raises(OverloadedError, match=r"the wait would be 1\.1 s"), admission.enter():
            pass
        began[50]()
        held.enter_context(admission.enter())
    assert admission.in_flight == 0


async def test_a_burst_on_an_idle_engine_is_let_in_whatever_the_pace_was() -> None:
    clock = Clock()
    admission = Admission(1000, clock, max_queue_s=1.0)
    with ExitStack() as held:
        for _ in range(20):  # one at a time, half a second each: a slow pace, but no queue
            begin = held.enter_context(admission.enter())
            clock.now_s += 0.5
            begin()
        for _ in range(100):
            held.enter_context(admission.enter())
        clock.now_s += 0.3  # none of them has begun
        with pytest.raises(OverloadedError), admission.enter():
            pass


async def test_without_a_bound_on_the_wait_only_the_number_counts() -> None:
    clock = Clock()
    admission = Admission(3, clock)
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(admission.enter())
            clock.now_s += 1000.0
        with pytest.raises(OverloadedError, match="the limit is 3"), admission.enter():
            pass


def test_a_queue_that_is_too_slow_refuses_over_the_wire() -> None:
    engine = ScriptedEngine(step_s=0.001, running_bound=1)
    engine.paused.set()
    with (
        serving(engine, settings=GatewaySettings(max_queue_s=0.2)) as served,
        Client(served.address, NO_RETRY) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.generate, [1], Sampling(max_tokens=2))
        wait_until(lambda: engine.num_held == 1)
        wait_until(lambda: refused_for_its_wait(client))
        engine.paused.clear()
        assert first.result().token_ids == expected_tokens([1], 2)
        assert client.generate([2], Sampling(max_tokens=2)).token_ids == expected_tokens([2], 2)


def refused_for_its_wait(client: Client) -> bool:
    """Ask with little patience: a request that is let in has to leave again."""
    try:
        client.generate([2], Sampling(max_tokens=2), timeout_s=0.05)
    except DeadlineExceededError:
        return False
    except OverloadedError as error:
        return "the wait would be" in error.message
    return False


def test_a_burst_fills_the_bound_and_the_rest_is_refused_at_once() -> None:
    engine = ScriptedEngine(step_s=0.001)
    engine.paused.set()
    with serving(engine, settings=GatewaySettings(max_requests=20)) as served:
        with Client(served.address, NO_RETRY) as client, ThreadPoolExecutor(60) as pool:
            client.wait_ready()

            pushed_back: list[tuple[str, bool]] = []

            def one(_index: int) -> float | tuple[int, ...]:
                began_s = time.monotonic()
                try:
                    return client.generate([1], Sampling(max_tokens=2)).token_ids
                except OverloadedError as error:
                    pushed_back.append((error.reason, error.retry_after_s is not None))
                    return time.monotonic() - began_s

            futures = [pool.submit(one, index) for index in range(60)]
            wait_until(lambda: sum(future.done() for future in futures) == 40)
            assert engine.num_held == 20
            engine.paused.clear()
            answers = [future.result() for future in futures]
        refusals = sorted(answer for answer in answers if isinstance(answer, float))
        assert len(refusals) == 40
        assert pushed_back == [("QUEUE_FULL", True)] * 40
        assert answers.count(expected_tokens([1], 2)) == 20
        # 60 client threads share the CPU with the server, so this bounds order of magnitude, not the server's own time
        assert refusals[len(refusals) // 2] < 0.5


def test_a_refusal_carries_push_back_and_no_headers() -> None:
    engine = ScriptedEngine(running_bound=0, max_waiting=0)
    with serving(engine) as served, grpc.insecure_channel(served.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(stopping={"max_tokens": 2})
        request.token_ids.ids.append(1)
        call = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request))
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(call.trailing_metadata())
        assert int(trailers[PUSHBACK_KEY]) == 200
        assert not call.initial_metadata()
        assert engine.num_held == 0
        assert served.gateway.admission.in_flight == 0


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate", "Chat", "StreamChat"])
def test_a_full_gateway_does_not_read_what_it_refuses(method: str) -> None:
    """The body is no message at all; a gateway with room says so, and a full one has not looked."""
    engine = ScriptedEngine(step_s=0.001)
    engine.paused.set()
    settings = GatewaySettings(max_requests=1)
    with (
        serving(engine, settings=settings) as served,
        grpc.insecure_channel(served.address) as channel,
        Client(served.address, NO_RETRY) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        kind: Any = channel.unary_stream if method.startswith("Stream") else channel.unary_unary
        call = kind(f"/llama4_dist.v1.InferenceService/{method}", response_deserializer=bytes)
        assert code_of(call) is grpc.StatusCode.INVALID_ARGUMENT
        running = pool.submit(client.generate, [1], Sampling(max_tokens=2))
        wait_until(lambda: engine.num_held == 1)
        code = code_of(call)
        engine.paused.clear()  # before a failure could leave the request waiting for ever
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert running.result().token_ids == expected_tokens([1], 2)
        wait_until(lambda: served.gateway.admission.in_flight == 0)
        assert code_of(call) is grpc.StatusCode.INVALID_ARGUMENT


def code_of(call: "grpc.UnaryStreamMultiCallable[bytes, bytes] | grpc.UnaryUnaryMultiCallable[bytes, bytes]") -> object:
    with pytest.raises(grpc.RpcError) as failure:
        list(call(b"\xff\xff\xff"))
    return failure.value.code()


def test_our_client_obeys_push_back() -> None:
    engine = ScriptedEngine(step_s=0.001, running_bound=1, max_waiting=0)
    with serving(engine) as served, Client(served.address) as client:
        engine.paused.set()
        stream = client.stream_generate([1], Sampling(max_tokens=2))
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(lambda: [delta.token_ids for delta in stream])
            wait_until(lambda: engine.num_held == 1)
            began_s = time.monotonic()
            second = pool.submit(client.generate, [2], Sampling(max_tokens=2))
            wait_until(lambda: "RESOURCE_EXHAUSTED" in str(rpc_codes(served.gateway.metrics)))
            engine.paused.clear()
            assert first.result()
            assert second.result().token_ids == expected_tokens([2], 2)
            assert time.monotonic() - began_s >= 0.2  # the engine's retry_after_s


def rpc_codes(metrics: object) -> list[str]:
    registry = metrics.registry  # type: ignore[attr-defined]
    return [
        sample.labels["code"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "llama4_dist_rpc_calls_total" and sample.value > 0
    ]


def test_a_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    engine = ScriptedEngine(step_s=0.005)
    with serving(engine) as served, Client(served.address, NO_RETRY) as client:
        stream = client.stream_generate([5], Sampling(max_tokens=60))
        deltas = iter(stream)
        first = next(deltas)
        with ThreadPoolExecutor(1) as pool:
            drain = pool.submit(served.run, served.gateway.drain(10.0))
            wait_until(lambda: served.gateway.admission.draining)
            assert not client.health("readiness")
            assert client.health("liveness")
            with pytest.raises(UnavailableError) as refused:
                client.generate([1], Sampling(max_tokens=1))
            assert refused.value.reason == "DRAINING"
            rest = [token for delta in deltas for token in delta.token_ids]
            assert (*first.token_ids, *rest) == expected_tokens([5], 60)
            drain.result()
        with pytest.raises(UnavailableError):
            client.health()


def test_a_drain_that_takes_too_long_ends_requests_as_retriable() -> None:
    engine = ScriptedEngine(step_s=0.01)
    with serving(engine) as served, Client(served.address, NO_RETRY) as client:
        deltas = iter(client.stream_generate([5], Sampling(max_tokens=500)))
        next(deltas)
        with ThreadPoolExecutor(1) as pool:
            drain = pool.submit(served.run, served.gateway.drain(0.1))
            with pytest.raises(UnavailableError) as cut:
                list(deltas)
            assert cut.value.reason == "DRAINING"
            drain.result()
        wait_until(lambda: engine.num_held == 0)


def test_a_call_without_a_deadline_ends_at_the_servers_cap() -> None:
    engine = ScriptedEngine()
    engine.paused.set()  # an engine that hangs enforces no timeout of its own
    with serving(engine, settings=GatewaySettings(max_request_s=0.2)) as served, Client(served.address) as client:
        with pytest.raises(DeadlineExceededError):
            client.generate([1], Sampling(max_tokens=2))
        with pytest.raises(DeadlineExceededError):
            list(client.stream_generate([1], Sampling(max_tokens=2)))
        wait_until(lambda: engine.num_held == 0)


def test_an_answer_above_the_limit_is_refused_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    settings = GatewaySettings(max_response_bytes=1000)
    large = Sampling(max_tokens=100, logprobs=1, prompt_logprobs=1)
    with serving(ScriptedEngine(), settings=settings) as served, Client(served.address) as client:
        with pytest.raises(OverloadedError, match="larger than max"):
            client.generate([1] * 400, large)
        with pytest.raises(OverloadedError, match="larger than max"):
            list(client.stream_generate([1] * 400, large))
        assert client.generate([1], Sampling(max_tokens=2)).token_ids == expected_tokens([1], 2)
        wait_until(lambda: served.gateway.admission.in_flight == 0)
    assert "request_failed" not in caplog.text
