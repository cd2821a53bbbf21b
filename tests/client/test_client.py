"""The clients: what they import, when they retry, and that the asyncio one answers as the blocking one does."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from llama4_dist.client import AsyncClient, Client, ConnectOptions
from llama4_dist.client.endpoints import addresses_of
from llama4_dist.client.results import Delta
from llama4_dist.client.retry import Attempts, may_retry, wait_s
from llama4_dist.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    Llama4Error,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
)
from llama4_dist.request import Message, Sampling
from llama4_dist.rpc import status
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, byte_tokenizer, serving
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(step_s=0.001)


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(engine, byte_tokenizer()) as running:
        yield running


class FailedCall(grpc.RpcError):
    def __init__(self, error: Llama4Error) -> None:
        self._error = error

    def code(self) -> grpc.StatusCode:
        return status.code_of(self._error)

    def details(self) -> str:
        return self._error.message

    def trailing_metadata(self) -> Any:
        return status.trailing_metadata(self._error, status.to_status(self._error))


def test_importing_the_client_loads_neither_torch_nor_ray_nor_numpy() -> None:
    code = (
        "import sys, llama4_dist.client\n"
        "heavy = {'torch', 'ray', 'numpy', 'pydantic', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


async def test_the_asyncio_client_answers_as_the_blocking_one(served: Served) -> None:
    sampling = Sampling(max_tokens=8, n=2, logprobs=0)
    messages = [Message(role="user", content="hi")]
    async with AsyncClient(served.address) as one:
        await one.wait_ready(5)
        stream = one.stream_chat(messages, sampling, request_id="a")
        deltas = [delta async for delta in stream]
        answers = (
            await one.generate("hello", sampling, request_id="a"),
            await one.chat(messages, sampling, request_id="a"),
            await one.list_models(),
            await one.get_model("models/tiny"),
            await one.tokenize("hi"),
            await one.detokenize([104, 105]),
            await one.apply_chat_template(messages),
            await one.health("liveness"),
        )
        with pytest.raises(NotFoundError):
            await one.get_model("models/other")
        with pytest.raises(NotFoundError):
            await one.health("nonsense")

    with Client(served.address) as two:
        assert answers == (
            two.generate("hello", sampling, request_id="a"),
            two.chat(messages, sampling, request_id="a"),
            two.list_models(),
            two.get_model("models/tiny"),
            two.tokenize("hi"),
            two.detokenize([104, 105]),
            two.apply_chat_template(messages),
            two.health("liveness"),
        )
    assert stream.completion == answers[1]
    assert stream.request_id == "a"
    assert sum(len(delta.token_ids) for delta in deltas) == 16


def test_without_an_id_each_call_is_its_own_request(served: Served, engine: ScriptedEngine) -> None:
    with Client(served.address) as client:
        ids = {client.generate([1], Sampling(max_tokens=1)).request_id for _ in range(3)}
    assert len(ids) == 3
    assert all(len(request_id) == 32 for request_id in ids)


def test_a_stream_read_half_way_has_no_completion(served: Served) -> None:
    with Client(served.address) as client:
        stream = client.stream_generate([1], Sampling(max_tokens=400))
        assert stream.request_id == ""
        next(iter(stream))
        assert stream.request_id
        with pytest.raises(EngineError, match="ended before"):
            _ = stream.completion
        stream.close()
        stream.close()


def test_a_bad_request_names_its_fields(served: Served) -> None:
    with Client(served.address) as client, pytest.raises(InvalidRequestError) as refused:
        client.generate([1], Sampling(temperature=-1, top_p=7))
    assert [violation.field for violation in refused.value.violations] == ["temperature", "top_p"]


def test_a_failing_stream_is_begun_again_and_gives_each_token_once(served: Served, engine: ScriptedEngine) -> None:
    with Client(served.address, ConnectOptions(max_attempts=3)) as client:
        for position in (0, 2):
            engine.fail_at = {position: UnavailableError("no replica", retry_after_s=0.01)}
            num_before = len(engine.submitted)
            deltas: list[Delta] = []
            with pytest.raises(UnavailableError, match="no replica"):
                deltas.extend(client.stream_generate([1], Sampling(max_tokens=5)))
            engine.fail_at = {}
            assert len(engine.submitted) - num_before == 3
            assert tuple(token for delta in deltas for token in delta.token_ids) == expected_tokens([1], position)


def test_a_server_that_starts_late_is_found() -> None:
    with serving(ScriptedEngine()) as first:
        address = first.address
    with Client(address, ConnectOptions(max_attempts=1)) as client:
        began_s = time.monotonic()
        with pytest.raises(UnavailableError):
            client.generate([1], timeout_s=2)
        assert time.monotonic() - began_s < 2.5
    with (
        Client(address, ConnectOptions(max_attempts=100, timeout_s=20)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.generate, [1], Sampling(max_tokens=3))
        time.sleep(0.2)  # the first attempts find nobody
        with serving(ScriptedEngine(), address=address):
            assert answer.result(timeout=60).token_ids == expected_tokens([1], 3)


def test_a_closed_client_cancels(served: Served, engine: ScriptedEngine) -> None:
    client = Client(served.address)
    deltas = iter(client.stream_generate([1], Sampling(max_tokens=400)))
    next(deltas)
    client.close()
    with pytest.raises(RequestCancelledError):
        list(deltas)
    wait_until(lambda: engine.num_held == 0)


def test_push_back_wins_over_backoff_and_jitter_only_adds() -> None:
    told = OverloadedError("x", retry_after_s=3.0)
    waits = [wait_s(told, 1) for _ in range(50)]
    assert 3.0 <= min(waits) <= max(waits) <= 3.75
    own = [wait_s(UnavailableError("x"), num_failed) for num_failed in range(1, 12)]
    assert own[0] < 0.07
    assert own[3] > own[0]
    assert max(own) <= 6.25


@pytest.mark.parametrize(
    ("error", "retries"),
    [
        (OverloadedError("x", retry_after_s=1), True),
        (OverloadedError("a message above the limit"), False),
        (UnavailableError("x"), True),
        (EngineError("x"), False),
        (EngineError("x", reason="WORKER_LOST"), True),
        (EngineError("stream reset", reason="TRANSPORT"), True),
        (DeadlineExceededError("x"), False),
        (NotFoundError("x"), False),
    ],
)
def test_only_overload_absence_and_loss_are_retried(error: Llama4Error, retries: bool) -> None:
    assert may_retry(error) is retries


def test_attempts_end_at_the_count_the_deadline_and_the_first_token() -> None:
    failure = FailedCall(UnavailableError("gone", retry_after_s=0.5))
    attempts = Attempts(ConnectOptions(max_attempts=3), None)
    assert [attempts.delay_s(failure, begun=False) >= 0.5 for _ in range(2)] == [True, True]
    with pytest.raises(UnavailableError, match="gone"):
        attempts.delay_s(failure, begun=False)
    with pytest.raises(UnavailableError):
        Attempts(ConnectOptions(), None).delay_s(failure, begun=True)
    with pytest.raises(UnavailableError):
        Attempts(ConnectOptions(), 0.1).delay_s(failure, begun=False)  # 0.5 s would be too late
    with pytest.raises(DeadlineExceededError):
        _ = Attempts(ConnectOptions(timeout_s=-1.0), None).remaining_s
    assert Attempts(ConnectOptions(), None).remaining_s is None


def test_calls_go_to_the_next_gateway_when_one_is_gone(served: Served) -> None:
    with serving(ScriptedEngine()) as gone:
        pass
    addresses = [gone.address, served.address]
    with Client(", ".join(addresses), ConnectOptions(max_attempts=2)) as client:
        began_s = time.monotonic()
        assert client.health("liveness")
        assert client.generate([1], Sampling(max_tokens=3)).token_ids == expected_tokens([1], 3)
        assert list(client.stream_generate([1], Sampling(max_tokens=3)))
        assert client.tokenize("hi")
        assert time.monotonic() - began_s < 2.0
    with (
        Client([gone.address], ConnectOptions(max_attempts=1)) as client,
        pytest.raises(UnavailableError),
    ):
        client.health()


async def test_asyncio_calls_go_to_the_next_gateway_when_one_is_gone(served: Served) -> None:
    with serving(ScriptedEngine()) as gone:
        pass
    async with AsyncClient([gone.address, served.address], ConnectOptions(max_attempts=2)) as client:
        assert (await client.generate([1], Sampling(max_tokens=3))).token_ids == expected_tokens([1], 3)
        assert await client.health("liveness")


def test_each_gateway_is_tried_before_any_is_waited_for() -> None:
    gone = UnavailableError("gone", retry_after_s=3.0)
    waits = [wait_s(gone, num_failed, 3) for num_failed in range(1, 7)]
    assert [wait > 1.0 for wait in waits] == [False, False, True] * 2
    assert wait_s(OverloadedError("full", retry_after_s=3.0), 1, 3) >= 3.0


@pytest.mark.parametrize(
    ("address", "addresses"),
    [
        ("a:1", ("a:1",)),
        (" a:1, b:2,,a:1 ", ("a:1", "b:2")),
        (["a:1", "b:2"], ("a:1", "b:2")),
    ],
)
def test_addresses_are_read_from_text_or_a_sequence(address: str | list[str], addresses: tuple[str, ...]) -> None:
    assert addresses_of(address) == addresses


@pytest.mark.parametrize("address", ["", " , ", []])
def test_no_address_is_refused(address: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="names no gateway"):
        Client(address)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_attempts"):
        ConnectOptions(max_attempts=0)
