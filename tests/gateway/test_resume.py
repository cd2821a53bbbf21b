"""A stream is resumed by (request id, tokens received): nothing is repeated, nothing left out, nothing given away."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import ConfigError, InvalidRequestError, Llama4Error, NotFoundError
from llama4_dist.gateway.engine_ids import EngineIds, engine_id_key
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from llama4_dist.rpc import status
from llama4_dist.rpc.wire import generate_to_proto
from llama4_dist.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, byte_tokenizer, serving
from tests.waiting import wait_until

Events = list[inference_pb2.StreamGenerateResponse]


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(step_s=0.005)


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(engine, byte_tokenizer()) as running:
        yield running


@pytest.fixture
def stub(served: Served) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def message(request_id: str, resume: list[int] | None = None, **sampling: Any) -> inference_pb2.StreamGenerateRequest:
    request = generate_to_proto([1], Sampling(**sampling), model="", request_id=request_id, priority=0)
    wrapped = inference_pb2.StreamGenerateRequest(request=request)
    if resume is not None:
        wrapped.resume.CopyFrom(types_pb2.Resume(next_token_index=resume))
    return wrapped


def refusal(stub: inference_pb2_grpc.InferenceServiceStub, *arguments: object, **sampling: int) -> Llama4Error:
    metadata = sampling.pop("metadata", ())
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamGenerate(message(*arguments, **sampling), timeout=5, metadata=metadata))  # type: ignore[arg-type]
    return status.from_rpc_error(caught.value)


def tokens_of(events: Events, index: int = 0) -> tuple[int, ...]:
    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    return tuple(token for delta in deltas if delta.output_index == index for token in delta.token_ids)


def test_a_resumed_stream_is_whole_but_for_the_tokens_received(
    stub: inference_pb2_grpc.InferenceServiceStub, engine: ScriptedEngine
) -> None:
    first = stub.StreamGenerate(message("resumed", max_tokens=60, n=2))
    begun = [next(first) for _ in range(20)]
    received = [len(tokens_of(begun, index)) for index in range(2)]
    num_submitted = len(engine.submitted)
    resumed = list(stub.StreamGenerate(message("resumed", received, max_tokens=60, n=2)))
    for index in range(2):
        assert tokens_of(begun, index) + tokens_of(resumed, index) == expected_tokens([1], 60, index)
    assert [event.WhichOneof("event") for event in resumed].count("finished") == 2
    assert resumed[0].started.request_id == "resumed"
    assert resumed[-1].usage.completion_tokens == 120
    text = "".join(event.delta.text for event in [*begun, *resumed] if event.delta.output_index == 0)
    assert text.encode() == bytes(expected_tokens([1], 60))
    assert len(engine.submitted) == num_submitted
    first.cancel()


def test_what_cannot_be_resumed_is_answered_alike(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    first = stub.StreamGenerate(message("mine", max_tokens=400))
    next(first)
    stranger = (("authorization", "Bearer another"),)
    refusals = [
        refusal(stub, "unknown", [0], max_tokens=400),
        refusal(stub, "mine", [0], max_tokens=400, metadata=stranger),  # type: ignore[arg-type]
        refusal(stub, "mine", [0], max_tokens=399),
    ]
    assert all(isinstance(error, NotFoundError) for error in refusals)
    assert len({(error.message, error.reason) for error in refusals}) == 1
    next(first)  # untouched
    first.cancel()


@pytest.mark.parametrize("resume", [[300], [], [0, 0]])
def test_a_place_that_does_not_exist_is_out_of_range(
    stub: inference_pb2_grpc.InferenceServiceStub, resume: list[int]
) -> None:
    first = stub.StreamGenerate(message("short", max_tokens=300))
    next(first)
    error = refusal(stub, "short", resume, max_tokens=300)
    assert isinstance(error, InvalidRequestError)
    assert error.reason == "OUT_OF_RANGE"
    assert [violation.field for violation in error.violations] == ["resume.next_token_index"]
    first.cancel()


def test_a_resume_must_name_its_request(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    error = refusal(stub, "", [0], max_tokens=9)
    assert isinstance(error, InvalidRequestError)
    assert [violation.field for violation in error.violations] == ["request.request_id"]


def test_started_names_the_seed_that_is_used(
    stub: inference_pb2_grpc.InferenceServiceStub, engine: ScriptedEngine
) -> None:
    seeds = []
    for request_id, seed in (("s1", 2**64 - 1), ("s2", None), ("s3", None)):
        fields: dict[str, Any] = {} if seed is None else {"seed": seed}
        events = list(stub.StreamGenerate(message(request_id, max_tokens=1, **fields)))
        seeds.append(events[0].started.seed)
        assert engine.submitted[-1].sampling.seed == seeds[-1]
    assert seeds[0] == 2**64 - 1
    assert seeds[1] != seeds[2]


def test_engines_know_requests_by_ids_that_only_gateways_of_the_cluster_compute() -> None:
    key = engine_id_key(b"s" * 32)
    one, two, other, alone = EngineIds(key), EngineIds(key), EngineIds(engine_id_key(b"t" * 32)), EngineIds(None)
    assert one.engine_id("tenant", "r") == two.engine_id("tenant", "r")
    assert one.seed("tenant", "r") == two.seed("tenant", "r")
    same = [one.engine_id("tenant", "r"), one.engine_id("tenant", "q"), one.engine_id("stranger", "r")]
    foreign = [ids.engine_id("tenant", "r") for ids in (other, alone, EngineIds(None))]
    assert len({*same, *foreign, f"{one.seed('tenant', 'r'):x}"}) == 7
    assert "engine_id_key" not in repr(GatewaySettings(engine_id_key=key))
    with pytest.raises(ConfigError, match="engine_id_key"):
        GatewaySettings(engine_id_key=b"short")


def test_an_id_is_free_again_once_its_request_has_left_the_engine(served: Served, engine: ScriptedEngine) -> None:
    """Its stop string is known to the gateway only: the next request of that id waits for the engine's last word."""
    text = bytes(expected_tokens([1], 40)).decode()
    with Client(served.address, ConnectOptions(max_attempts=1)) as client:
        for _ in range(20):
            stopped = client.generate([1], Sampling(max_tokens=40, stop=(text[3:6],)), request_id="again")
            assert stopped.text == text[:3]
            assert client.generate([1], Sampling(max_tokens=9), request_id="again").token_ids == expected_tokens([1], 9)
    wait_until(lambda: engine.num_held == 0)
