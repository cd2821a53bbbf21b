"""One request id is one request: a repeated call joins it, one with another body is refused."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import DuplicateRequestError, EngineError, UnavailableError
from llama4_dist.request import Sampling
from llama4_dist.rpc.wire import generate_to_proto
from llama4_dist.text.tokenizer import Tokenizer
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


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as connected:
        yield connected


def test_a_repeated_call_joins_and_gets_every_token_from_the_first(client: Client, engine: ScriptedEngine) -> None:
    sampling = Sampling(max_tokens=60)
    first = iter(client.stream_generate([1], sampling, request_id="join"))
    begun = [next(first) for _ in range(10)]
    num_submitted = len(engine.submitted)
    late = client.stream_generate([1], sampling, request_id="join")
    joined = [token for delta in late for token in delta.token_ids]
    assert tuple(joined) == expected_tokens([1], 60)
    assert len(engine.submitted) == num_submitted
    rest = [token for delta in [*begun, *first] for token in delta.token_ids]
    assert tuple(rest) == expected_tokens([1], 60)


def test_the_request_lives_until_its_last_reader_leaves(client: Client, engine: ScriptedEngine) -> None:
    sampling = Sampling(max_tokens=80)
    first = client.stream_generate([1], sampling, request_id="two-readers")
    next(iter(first))
    second = iter(client.stream_generate([1], sampling, request_id="two-readers"))
    received = list(next(second).token_ids)
    first.close()
    received += [token for delta in second for token in delta.token_ids]
    assert tuple(received) == expected_tokens([1], 80)
    wait_until(lambda: engine.num_held == 0)


def test_the_same_id_with_another_body_is_refused_while_it_runs(client: Client) -> None:
    stream = client.stream_generate([1], Sampling(max_tokens=100), request_id="taken")
    next(iter(stream))
    with pytest.raises(DuplicateRequestError):
        client.generate([1], Sampling(max_tokens=99), request_id="taken")
    stream.close()
    wait_until(lambda: client.generate([1], Sampling(max_tokens=1), request_id="taken").text == "")


def test_a_reader_that_stops_reading_holds_up_nobody_and_misses_nothing(
    served: Served, client: Client, engine: ScriptedEngine
) -> None:
    """More than HTTP/2's window is produced, so the gateway's write blocks; the engine is done with it all the same."""
    sampling = Sampling(max_tokens=500, n=8, logprobs=1)
    request = generate_to_proto([5], sampling, model="", request_id="", priority=0)
    windows = [("grpc.http2.lookahead_bytes", 16384), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(served.address, windows) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request))
        events = [next(call)]
        wait_until(lambda: len(engine.submitted) > 0 and engine.num_held == 0)
        assert client.generate([1], Sampling(max_tokens=3), timeout_s=5).token_ids == expected_tokens([1], 3)
        assert served.gateway.admission.in_flight == 1, "the reader's window held everything: nothing was tested"
        events += list(call)
    tokens: dict[int, list[int]] = {}
    for event in events:
        tokens.setdefault(event.delta.output_index, []).extend(event.delta.token_ids)
    assert tokens == {index: list(expected_tokens([5], 500, index)) for index in range(8)}
    assert len(events) < 8 * 500 / 2, "what waited should have come together"
    wait_until(lambda: served.gateway.admission.in_flight == 0)


def test_tokens_of_several_steps_become_one_message(served: Served, client: Client, engine: ScriptedEngine) -> None:
    """The gateway's loop is held up while the engine steps on; what piled up comes as one delta."""
    stream = client.stream_generate([3], Sampling(max_tokens=100))
    deltas = iter(stream)
    received = [next(deltas)]
    served.loop.call_soon_threadsafe(time.sleep, 0.3)
    received += list(deltas)
    assert tuple(token for delta in received for token in delta.token_ids) == expected_tokens([3], 100)
    assert max(len(delta.token_ids) for delta in received) > 20


def test_a_failure_after_the_first_token_ends_the_stream_with_its_status(
    served: Served, engine: ScriptedEngine
) -> None:
    client = Client(served.address, ConnectOptions(max_attempts=1))
    engine.fail_at = {4: EngineError("cuda:3 at 10.0.0.7 died", reason="WORKER_LOST")}
    try:
        received: list[int] = []
        deltas = client.stream_generate([3], Sampling(max_tokens=100))
        with pytest.raises(EngineError) as failed:
            received.extend(token for delta in deltas for token in delta.token_ids)
        assert tuple(received) == expected_tokens([3], 4)
        assert failed.value.reason == "WORKER_LOST"
        assert "10.0.0.7" not in failed.value.message
    finally:
        engine.fail_at = {}
        client.close()


def test_a_failure_before_the_first_token_is_retried(client: Client, engine: ScriptedEngine) -> None:
    engine.fail_at = {0: UnavailableError("no replica", retry_after_s=0.05)}
    with ThreadPoolExecutor(1) as pool:
        num_submitted = len(engine.submitted)
        answer = pool.submit(client.generate, [9], Sampling(max_tokens=3))
        wait_until(lambda: len(engine.submitted) > num_submitted)
        engine.fail_at = {}
        assert answer.result().token_ids == expected_tokens([9], 3)


def test_a_long_prompt_is_encoded_without_holding_up_streams() -> None:
    def encode(text: str) -> list[int]:
        time.sleep(0.8)  # stands for megabytes of text
        return [len(text) % 256]

    engine, tokenizer = ScriptedEngine(step_s=0.005), Tokenizer([b"x"] * 256, {"<|begin_of_text|>": 256}, encode)
    with serving(engine, tokenizer) as served, Client(served.address) as client, ThreadPoolExecutor(1) as pool:
        deltas = iter(client.stream_generate([1], Sampling(max_tokens=400)))
        next(deltas)
        long_prompt = pool.submit(client.generate, "a" * 5000, Sampling(max_tokens=1))
        sizes = []
        while not long_prompt.done():
            sizes.append(len(next(deltas).token_ids))
        assert long_prompt.result().prompt_token_ids == (256, 5000 % 256)
        num_while_encoding = sum(sizes)
        sizes += [len(delta.token_ids) for delta in deltas]
    assert num_while_encoding > 20
    assert max(sizes) < 100, "the stream stood still while the prompt was encoded"
