"""The internal engine service and its client, over real loopback connections."""

import queue
from collections.abc import Callable, Iterator, Sequence

import grpc
import pytest
import torch

from llama4_dist.errors import DuplicateRequestError, OverloadedError, UnauthenticatedError, UnavailableError
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.internal.v1 import engine_pb2_grpc as pb_grpc
from llama4_dist.request import EngineRequest, FinishReason, Sampling, TokenOutput
from llama4_dist.rpc import engine_service, run_stream
from llama4_dist.rpc.cluster_token import token_metadata
from llama4_dist.rpc.engine_service import EngineServer
from llama4_dist.rpc.remote_engine import RemoteEngine
from tests.rpc.counting_engine import VOCAB, CountingEngine
from tests.waiting import wait_until

SECRET = b"s" * 32
OTHER_SECRET = b"t" * 32


class Gateway:
    """A client with its outputs in a queue."""

    def __init__(self, server: EngineServer, secret: bytes = SECRET) -> None:
        self.engine = RemoteEngine(server.address, secret=secret, timeout_s=5)
        self.steps: queue.Queue[Sequence[TokenOutput]] = queue.Queue()
        self.engine.start(self.steps.put)

    def submit(self, request_id: str, first: int = 0, max_tokens: int = 100) -> None:
        sampling = Sampling(max_tokens=max_tokens)
        self.engine.submit(EngineRequest(request_id=request_id, prompt_token_ids=(first,), sampling=sampling))

    def next_step(self) -> Sequence[TokenOutput]:
        return self.steps.get(timeout=5)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def server(engine: CountingEngine) -> Iterator[EngineServer]:
    server = EngineServer(engine, host="127.0.0.1", secret=SECRET)
    yield server
    server.close(grace_s=0)


@pytest.fixture
def connect(server: EngineServer) -> Iterator[Callable[[], Gateway]]:
    gateways: list[Gateway] = []

    def open_gateway() -> Gateway:
        gateways.append(Gateway(server))
        return gateways[-1]

    yield open_gateway
    for gateway in gateways:
        gateway.engine.close()


def test_a_step_is_one_message_with_all_its_sequences(engine: CountingEngine, connect: Callable[[], Gateway]) -> None:
    gateway = connect()
    gateway.submit("a", first=10, max_tokens=2)
    gateway.submit("b", first=20, max_tokens=2)
    wait_until(lambda: len(engine.running) == 2)
    engine.step()
    engine.step()
    first, second = gateway.next_step(), gateway.next_step()
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in first] == [("a", (11,), None), ("b", (21,), None)]
    assert [(o.token_ids, o.finish_reason) for o in second] == [
        ((12,), FinishReason.LENGTH),
        ((22,), FinishReason.LENGTH),
    ]
    gateway.submit("a", first=30)  # an id may be used again once its request has ended
    wait_until(lambda: len(engine.running) == 1)


def test_outputs_go_to_the_gateway_that_submitted_them(engine: CountingEngine, connect: Callable[[], Gateway]) -> None:
    left, right = connect(), connect()
    left.submit("l", first=1)
    right.submit("r", first=2)
    wait_until(lambda: len(engine.running) == 2)
    engine.step()
    assert [o.request_id for o in left.next_step()] == ["l"]
    assert [o.request_id for o in right.next_step()] == ["r"]
    assert left.steps.empty()
    assert right.steps.empty()


def test_a_gateway_cannot_take_or_end_the_request_of_another(
    engine: CountingEngine, connect: Callable[[], Gateway]
) -> None:
    left, right = connect(), connect()
    left.submit("x", first=1)
    wait_until(lambda: len(engine.running) == 1)
    right.submit("x", first=2)
    (refusal,) = right.next_step()
    assert isinstance(refusal.error, DuplicateRequestError)
    right.engine.abort("x")
    right.submit("marker")  # commands are handled in order: once this one runs, the abort was refused
    wait_until(lambda: "marker" in engine.running)
    assert "x" in engine.running
    engine.step()
    assert [o.token_ids for o in left.next_step()] == [(2,)]


def test_an_aborted_request_ends_with_a_cancelled_output(
    engine: CountingEngine, connect: Callable[[], Gateway]
) -> None:
    gateway = connect()
    gateway.submit("a")
    gateway.engine.abort("a")
    (output,) = gateway.next_step()
    assert output.finish_reason is FinishReason.CANCELLED
    gateway.engine.abort("a")
    gateway.engine.abort("never submitted")
    assert engine.aborted == ["a"]


def test_a_refused_request_ends_with_the_engines_own_error(
    engine: CountingEngine, connect: Callable[[], Gateway]
) -> None:
    gateway = connect()
    for i in range(9):
        gateway.submit(f"r{i}")
    (output,) = gateway.next_step()
    assert output.request_id == "r8"
    assert isinstance(output.error, OverloadedError)
    assert output.error.retry_after_s == 1.5
    with pytest.raises(DuplicateRequestError):
        gateway.submit("r0")
    gateway.engine.abort("r0")
    assert gateway.next_step()[0].request_id == "r0"
    gateway.submit("r8")  # the refused id is free again
    wait_until(lambda: "r8" in engine.running)


def test_the_requests_of_a_lost_gateway_are_aborted_and_no_others(
    engine: CountingEngine, connect: Callable[[], Gateway]
) -> None:
    lost, kept = connect(), connect()
    lost.submit("l1")
    lost.submit("l2")
    kept.submit("k")
    wait_until(lambda: len(engine.running) == 3)
    lost.engine.close()
    wait_until(lambda: sorted(engine.aborted) == ["l1", "l2"])
    engine.step()
    assert [o.request_id for o in kept.next_step()] == ["k"]


def test_a_lost_worker_ends_every_running_request_with_unavailable(
    engine: CountingEngine, server: EngineServer, connect: Callable[[], Gateway]
) -> None:
    gateway = connect()
    gateway.submit("a")
    gateway.submit("b")
    wait_until(lambda: len(engine.running) == 2)
    server.close(grace_s=0)
    lost = gateway.next_step()
    assert [(o.request_id, type(o.error), o.error and o.error.reason) for o in lost] == [
        ("a", UnavailableError, "WORKER_LOST"),
        ("b", UnavailableError, "WORKER_LOST"),
    ]
    with pytest.raises(UnavailableError):
        gateway.submit("c")


def test_a_gateway_that_does_not_read_is_dropped_and_stalls_nobody(
    engine: CountingEngine, server: EngineServer, connect: Callable[[], Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_stream, "MAX_PENDING_STEPS", 64)
    reader = connect()
    reader.submit("read", max_tokens=10**9)
    unread = "unread" * 10_000  # outputs of 60 kB: flow control holds the sender after a few
    with grpc.insecure_channel(server.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        submit = pb.SubmitCommand(request_id=unread, prompt_token_ids=[1], sampling=pb.Sampling(max_tokens=10**9))
        commands: queue.SimpleQueue[pb.RunRequest] = queue.SimpleQueue()
        commands.put(pb.RunRequest(submit=submit))
        call = pb_grpc.EngineServiceStub(channel).Run(iter(commands.get, None), metadata=token_metadata(SECRET))
        wait_until(lambda: len(engine.running) == 2)
        num_steps = 0
        while unread not in engine.aborted:
            engine.step()
            num_steps += 1
            assert reader.next_step()[0].request_id == "read"
            assert num_steps < 10**4
        call.cancel()
    assert "read" in engine.running


def test_logits_cross_in_chunks_and_come_out_whole(
    connect: Callable[[], Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_service, "SCORE_CHUNK_BYTES", 3 * 4 * VOCAB)
    logits_TV = connect().engine.score(range(8))
    torch.testing.assert_close(logits_TV, torch.arange(8.0 * VOCAB).view(8, VOCAB), rtol=0, atol=0)
    chunks = list(engine_service.logit_chunks(logits_TV))
    assert [len(chunk) // (4 * VOCAB) for chunk in chunks] == [3, 3, 2]


def test_limits_and_stats_are_the_engines(engine: CountingEngine, connect: Callable[[], Gateway]) -> None:
    remote = connect().engine
    assert remote.limits == engine.limits
    assert remote.stats() == engine.stats()


def test_a_wrong_secret_is_refused(server: EngineServer) -> None:
    with pytest.raises(UnauthenticatedError):
        RemoteEngine(server.address, secret=OTHER_SECRET)


@pytest.mark.parametrize("method", ["Run", "Score", "GetStats", "GetLimits", "Unknown"])
@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer "),), (("authorization", "Bearer x" * 50),)])
def test_every_method_is_refused_without_the_token(
    server: EngineServer, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/llama4_dist.internal.v1.EngineService/{method}"
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", metadata=metadata, timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", ""])
def test_a_wildcard_address_is_refused(engine: CountingEngine, host: str) -> None:
    with pytest.raises(ValueError, match="every interface"):
        EngineServer(engine, host=host, secret=SECRET)


def test_a_short_secret_is_refused(engine: CountingEngine) -> None:
    with pytest.raises(ValueError, match="cluster secret"):
        EngineServer(engine, host="127.0.0.1", secret=b"short")
