"""No request of one client can hurt another, and each is answered with the code it deserves."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from llama4_dist.request import Sampling
from tests.gateway.corpus import INFERENCE, Case, all_cases, generate
from tests.gateway.replay import CHANNEL, PRIVATE, replay, send
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, byte_tokenizer, serving
from tests.gateway.serving_process import serving_process
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(step_s=0.002)


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(engine, byte_tokenizer()) as running:
        yield running


def test_every_bad_request_is_refused_and_no_other_client_notices(served: Served, engine: ScriptedEngine) -> None:
    assert replay(served, expected_tokens([7, 8], 20), lambda: engine.num_held, all_cases()) == []


def test_the_same_holds_without_asserts() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "tests.gateway.replay"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_bomb_is_not_inflated() -> None:  # R07
    """The server's own peak of memory; this process holds the 48 MiB before they are packed."""
    bomb = next(case for case in all_cases() if "bomb" in case.name)
    with serving_process(0.01) as (running, client, address):
        assert client.generate([1], Sampling(max_tokens=1)).token_ids
        before = peak_bytes(running.pid)
        with grpc.insecure_channel(address, CHANNEL) as channel:
            assert {send(channel, bomb)[0] for _ in range(3)} <= bomb.codes
        assert peak_bytes(running.pid) - before < 16 * 1024 * 1024


def peak_bytes(pid: int) -> int:
    """Return the most memory a process ever had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def test_two_thousand_refusals_leave_nothing_behind(served: Served, engine: ScriptedEngine) -> None:
    data = generate(sampling={"temperature": -1.0}).SerializeToString()
    case = Case(name="refused", codes=frozenset(), data=data)
    num_submitted, num_tasks = len(engine.submitted), served.num_tasks()
    with grpc.insecure_channel(served.address) as channel:
        method: Any = channel.unary_unary(case.method)
        for _ in range(4):
            codes = {call.exception().code() for call in [method.future(case.data) for _ in range(500)]}
            assert codes == {grpc.StatusCode.INVALID_ARGUMENT}
    assert len(engine.submitted) == num_submitted
    assert served.gateway.admission.in_flight == 0
    assert served.gateway.generations.num_running == 0
    wait_until(lambda: served.num_tasks() <= num_tasks + 2, timeout_s=2.0)


def test_a_second_message_on_a_streaming_call_is_ignored(served: Served) -> None:
    data = b"\x0a" + bytes([len(generate().SerializeToString())]) + generate().SerializeToString()
    with grpc.insecure_channel(served.address) as channel:
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(INFERENCE + "StreamGenerate")
        call = method(iter([data, b"\xff\xff"]), timeout=10)
        assert len(list(call)) >= 2
        assert call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("timeout_s", [1e-6, 0.0])
def test_a_deadline_in_the_past_is_answered_as_such(served: Served, timeout_s: float) -> None:
    case = Case(name="late", codes=frozenset(), data=generate().SerializeToString(), timeout_s=timeout_s)
    with grpc.insecure_channel(served.address) as channel:
        assert send(channel, case)[0] is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deadline_of_ten_years_and_none_are_capped(served: Served, engine: ScriptedEngine) -> None:
    with grpc.insecure_channel(served.address) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFERENCE + "Generate")
        for timeout_s in (None, 10 * 365 * 86400.0):
            method(generate().SerializeToString(), timeout=timeout_s)
            assert engine.submitted[-1].timeout_s == 600.0


def test_an_unforeseen_exception_shows_a_correlation_id_and_nothing_else(
    served: Served, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_request: object) -> None:
        raise RuntimeError(f"secret at {hex(id(engine))} in /tmp/secret.py")

    monkeypatch.setattr(engine, "submit", broken)
    with grpc.insecure_channel(served.address) as channel:
        code, told = send(channel, Case(name="broken", codes=frozenset(), data=generate().SerializeToString()))
    assert code is grpc.StatusCode.INTERNAL
    assert "correlation id" in told
    assert not PRIVATE.search(told), told
    assert "secret" not in told
    assert "secret at" in caplog.text
    assert served.gateway.generations.num_running == 0
