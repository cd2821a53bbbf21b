"""Requests whose gateway broke off: they go on for a while, and whoever knows id and digest may take them over."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from llama4_dist.errors import DuplicateRequestError, NotFoundError
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.internal.v1 import engine_pb2_grpc as pb_grpc
from llama4_dist.request import EngineRequest, FinishReason, Sampling
from llama4_dist.rpc import command_desk, engine_service, kept_request
from llama4_dist.rpc import engine_wire as wire
from llama4_dist.rpc.cluster_token import GATEWAY_KEY, token_metadata
from llama4_dist.rpc.engine_service import EngineServer
from llama4_dist.rpc.run_call import RunCall
from tests.engine.collector import Collector
from tests.engine.fake_model import tokens
from tests.rpc.counting_engine import CountingEngine
from tests.waiting import wait_until

SECRET = b"s" * 32
DIGEST = b"d" * 32


class RawGateway(Collector):
    """A gateway that can break off without a goodbye."""

    def __init__(self, server: EngineServer, name: str) -> None:
        super().__init__()
        self.num_messages = 0
        self.channel = grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        metadata = (*token_metadata(SECRET), (GATEWAY_KEY, name))
        self.call = RunCall(pb_grpc.EngineServiceStub(self.channel), metadata, self.hear)
        self.call.start()

    def hear(self, call: RunCall, message: pb.RunResponse) -> None:
        self.num_messages += 1
        self([wire.output_from_wire(output) for output in message.outputs])

    def submit(self, request_id: str = "r", *, digest: bytes = DIGEST, given: int = 0, **sampling: Any) -> None:
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=(10,),
            sampling=Sampling(**{"max_tokens": 20} | sampling),
            output_token_ids=tuple(range(11, 11 + given)),
            digest=digest,
        )
        self.call.send(pb.RunRequest(submit=wire.request_to_wire(request)))

    def attach(self, request_id: str = "r", digest: bytes = DIGEST) -> None:
        self.call.send(pb.RunRequest(attach=pb.AttachCommand(request_id=request_id, digest=digest)))

    def said(self, request_id: str = "r") -> list[int]:
        return tokens(self.outputs.get(request_id, []))

    def hears(self, last: int, request_id: str = "r") -> None:
        """Wait until all tokens up to `last` have come, each once."""
        self.wait(lambda: bool(self.said(request_id)) and self.said(request_id)[-1] == last)

    def break_off(self) -> None:
        self.call.cut()
        self.channel.close()


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def connect(engine: CountingEngine) -> Iterator[Callable[..., RawGateway]]:
    with ExitStack() as resources:
        servers: list[EngineServer] = []

        def open_gateway(name: str = "", ttl_s: float = 10.0) -> RawGateway:
            if not servers:
                servers.append(EngineServer(engine, host="127.0.0.1", secret=SECRET, resume_ttl_s=ttl_s))
                resources.callback(servers[0].close, grace_s=0)
            gateway = RawGateway(servers[0], name or f"gateway-{time.monotonic_ns()}")
            resources.callback(gateway.break_off)
            return gateway

        yield open_gateway


def started(gateway: RawGateway, engine: CountingEngine, num_steps: int, **options: int) -> None:
    """Submit "r" and take steps that the gateway hears."""
    gateway.submit(**options)  # type: ignore[arg-type]
    wait_until(lambda: "r" in engine.running)
    for _ in range(num_steps):
        engine.step()
    if num_steps:
        gateway.hears(10 + options.get("given", 0) + num_steps)


def test_a_stream_is_never_silent(connect: Callable[..., RawGateway]) -> None:
    gateway = connect()
    wait_until(lambda: gateway.num_messages >= 4)


def test_an_orphan_goes_on_and_is_attached_from_its_first_token(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    dead, other = connect(), connect()
    started(dead, engine, 3, logprobs=0)
    dead.break_off()
    wait_until(lambda: other.call.num_heard > 0)
    engine.step()
    other.attach()
    other.hears(14)
    engine.step()
    other.hears(15)
    assert other.said() == [11, 12, 13, 14, 15]
    outputs = other.outputs["r"]
    assert [output.attached_tokens for output in outputs] == [4, None]
    assert [output.queue_s for output in outputs] == [0.25, None]
    assert [one.token.token_id for output in outputs for one in output.logprobs or ()] == other.said()
    assert engine.aborted == []


def test_a_long_catch_up_comes_in_several_messages(
    connect: Callable[..., RawGateway], engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_request, "CHUNK_TOKENS", 2)
    dead, other = connect(), connect()
    started(dead, engine, 5, logprobs=0)
    dead.break_off()
    other.attach()
    other.hears(15)
    assert [len(output.token_ids) for output in other.outputs["r"]] == [2, 2, 1]
    assert [len(output.logprobs or ()) for output in other.outputs["r"]] == [2, 2, 1]


def test_an_orphan_without_a_token_is_attached_before_its_first(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    dead, other = connect(), connect()
    started(dead, engine, 0)
    dead.break_off()
    other.attach()
    other.wait(lambda: "r" in other.outputs)
    engine.step()
    other.hears(11)
    assert [output.attached_tokens for output in other.outputs["r"]] == [0, None]
    assert [output.queue_s for output in other.outputs["r"]] == [None, 0.25]


@pytest.mark.parametrize("when", ["heard", "unheard"])
def test_an_end_is_kept_for_who_comes_late(
    connect: Callable[..., RawGateway], engine: CountingEngine, when: str
) -> None:
    dead, other = connect(), connect()
    started(dead, engine, 3, max_tokens=4)
    if when == "heard":
        engine.step()
        dead.wait_for("r")
        dead.break_off()
    else:
        dead.break_off()
        engine.step()
    other.attach()
    outputs = other.wait_for("r")
    assert tokens(outputs) == [11, 12, 13, 14]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_unknown_wrong_and_owned_are_answered_alike(connect: Callable[..., RawGateway], engine: CountingEngine) -> None:
    living, dead = connect(), connect()
    started(living, engine, 2)
    dead.submit("dead")
    wait_until(lambda: "dead" in engine.running)
    dead.break_off()
    messages = set()
    for request_id, digest in (("unknown", DIGEST), ("dead", b"e" * 32), ("dead", b""), ("r", DIGEST)):
        other = connect()
        other.attach(request_id, digest)
        error = other.wait_for(request_id)[-1].error
        assert isinstance(error, NotFoundError)
        messages.add(error.message)
    assert len(messages) == 1
    engine.step()
    living.hears(13)
    assert engine.aborted == []


def test_an_attach_waits_for_the_owners_stream_to_be_noticed_broken(
    connect: Callable[..., RawGateway], engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "MAX_WAIT_S", 5.0)
    dead, other = connect(), connect()
    started(dead, engine, 2)
    other.attach()
    other.submit("marker")  # commands are taken in order: now the attach waits
    wait_until(lambda: "marker" in engine.running)
    assert "r" not in other.outputs
    dead.break_off()
    other.hears(12)


def test_a_repeated_submit_joins_the_orphan_and_another_body_is_refused(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    dead, other, third = connect(), connect(), connect()
    started(dead, engine, 3)
    dead.break_off()
    wait_until(lambda: third.call.num_heard > 0)
    third.submit(digest=b"e" * 32)
    assert isinstance(third.wait_for("r")[-1].error, DuplicateRequestError)
    other.submit()
    other.hears(13)
    engine.step()
    other.hears(14)
    assert other.said() == [11, 12, 13, 14]
    assert len(engine.submitted) == 1


@pytest.mark.parametrize("behind", [2, 0, -2])
def test_a_replay_that_returns_goes_on_where_it_wants_to(
    connect: Callable[..., RawGateway], engine: CountingEngine, behind: int
) -> None:
    """The group may have more tokens than the orphan, from an engine in between, or fewer."""
    dead, other = connect(), connect()
    started(dead, engine, 4)
    dead.break_off()
    wait_until(lambda: other.call.num_heard > 0)
    given = 4 - behind
    other.submit(given=given)
    other.submit("marker")
    wait_until(lambda: "marker" in engine.running)
    for _ in range(4):
        engine.step()
    other.hears(18)
    assert other.said() == list(range(11 + given, 19))
    assert [one.request_id for one in engine.submitted] == ["r", "marker"]


def test_an_orphan_that_lacks_log_probabilities_is_computed_anew(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    dead, other = connect(), connect()
    started(dead, engine, 2, given=3, logprobs=0)
    dead.break_off()
    other.attach()
    assert isinstance(other.wait_for("r")[-1].error, NotFoundError)
    other.forget("r")
    other.submit(logprobs=0)
    wait_until(lambda: len(engine.submitted) == 2 and "r" in engine.running)
    engine.step()
    other.hears(11)
    assert engine.aborted == ["r"]


def test_an_orphan_without_log_probabilities_to_lack_is_attached_whole(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    dead, other = connect(), connect()
    started(dead, engine, 2, given=3)
    dead.break_off()
    other.attach()
    other.hears(15)
    assert other.said() == [11, 12, 13, 14, 15]


@pytest.mark.parametrize(("ttl_s", "digest"), [(0.3, DIGEST), (0.0, DIGEST), (60.0, b"")])
def test_an_orphan_is_aborted_when_its_time_is_over(
    connect: Callable[..., RawGateway], engine: CountingEngine, ttl_s: float, digest: bytes
) -> None:
    """At once where nobody may attach it."""
    dead = connect(ttl_s=ttl_s)
    other = connect()
    dead.submit(digest=digest)
    wait_until(lambda: "r" in engine.running)
    dead.break_off()
    broken_s = time.monotonic()
    wait_until(lambda: engine.aborted == ["r"])
    assert (time.monotonic() - broken_s >= 0.25) is (ttl_s == 0.3)
    other.attach()
    assert isinstance(other.wait_for("r")[-1].error, NotFoundError)


def test_a_gateway_that_says_goodbye_leaves_no_orphan(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    gateway = connect()
    started(gateway, engine, 1)
    gateway.call.finish(5.0)
    wait_until(lambda: engine.aborted == ["r"])


def test_an_orphan_may_be_aborted_by_whoever_knows_its_id(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    dead, other = connect(), connect()
    started(dead, engine, 1)
    dead.break_off()
    wait_until(lambda: other.call.num_heard > 0)
    wait_until(lambda: other.call.send(pb.RunRequest(abort=pb.AbortCommand(request_id="r"))) or engine.aborted == ["r"])  # type: ignore[func-returns-value]


def test_a_newer_stream_of_a_gateway_ends_the_older_one(
    connect: Callable[..., RawGateway], engine: CountingEngine
) -> None:
    old = connect("one")
    started(old, engine, 2)
    new = connect("one")
    new.submit(given=2)
    new.submit("marker")
    wait_until(lambda: "marker" in engine.running)
    engine.step()
    new.hears(13)
    assert new.said() == [13]
    assert old.said() == [11, 12]


def test_the_number_of_orphans_is_bounded_oldest_first(
    connect: Callable[..., RawGateway], engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_service, "MAX_KEPT", 2)
    dead = connect()
    for index in range(4):
        dead.submit(f"r{index}")
    wait_until(lambda: len(engine.running) == 4)
    dead.break_off()
    wait_until(lambda: engine.aborted == ["r0", "r1"])
    other = connect()
    other.attach("r2")
    other.wait(lambda: "r2" in other.outputs)
    assert sorted(engine.running) == ["r2", "r3"]


def test_what_is_kept_is_bounded_in_tokens_and_log_probabilities(
    connect: Callable[..., RawGateway], engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_service, "MAX_KEPT_TOKENS", 12)
    dead = connect()
    dead.submit("scored", logprobs=0)
    dead.submit("plain")
    wait_until(lambda: len(engine.running) == 2)
    for _ in range(4):
        engine.step()
    dead.hears(14, "plain")
    dead.break_off()  # 4 + 4 and 4: they just fit
    other = connect()
    wait_until(lambda: other.num_messages >= 2)
    assert engine.aborted == []
    engine.step()
    wait_until(lambda: engine.aborted == ["scored"])
