"""What real streams of a real gateway deliver is recorded as it came, and the checker agrees with it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama4_dist.chaos.faults.processes import Stop
from llama4_dist.chaos.history.events import Event, EventKind, parse, read_file, reference_key
from llama4_dist.chaos.history.recorder import History, Recorder, recorded_async_stream, recorded_stream
from llama4_dist.chaos.history.reference import Reference, tokens_of
from llama4_dist.chaos.history.verdict import Rules, Verdict, judge
from llama4_dist.client import AsyncClient, Client, ConnectOptions
from llama4_dist.client.results import Delta
from llama4_dist.errors import EngineError, Llama4Error
from llama4_dist.request import EngineRequest, FinishReason, Sampling
from tests.faults.engine_history import EngineHistory
from tests.faults.fault import FaultNotVerified
from tests.faults.victims import victim
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, byte_tokenizer, serving

GREEDY = Sampling(temperature=0.0, max_tokens=8)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(step_s=0.002)


@pytest.fixture
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(engine, byte_tokenizer()) as running:
        yield running


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History(tmp_path / "run.jsonl", seed=11) as one:
        yield one


def reference_of(*prompts: list[int], sampling: dict[str, Any], num_tokens: int = 8) -> Reference:
    n = sampling.get("n", 1)
    return Reference(
        tokens={
            reference_key(prompt, sampling): tuple(expected_tokens(prompt, num_tokens, index) for index in range(n))
            for prompt in prompts
        }
    )


def verdict_of(history: History, reference: Reference | None = None, **rules: Any) -> Verdict:
    return judge(read_file(history.path), reference, Rules(**rules))


def kinds(history: History) -> list[str]:
    return [event.kind for event in read_file(history.path)]


def test_blocking_streams_of_many_threads_are_recorded_whole(served: Served, history: History) -> None:
    prompts = [[index] for index in range(8)]

    def run(prompt: list[int]) -> None:
        about: dict[str, Any] = {"request_id": f"r{prompt[0]}", "prompt": prompt, "sampling": GREEDY}
        stream = client.stream_generate(prompt, GREEDY, request_id=about["request_id"])
        assert sum(len(delta.token_ids) for delta in recorded_stream(history, stream, **about)) == 8

    with Client(served.address) as client:
        threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    verdict = verdict_of(history, reference_of(*prompts, sampling={"temperature": 0.0, "max_tokens": 8}))
    assert verdict.violations == []
    assert (verdict.outcomes, verdict.num_tokens, verdict.num_compared) == ({"finished": 8}, 64, 8)
    assert {event.seed for event in read_file(history.path)} == {11}


async def test_an_asyncio_stream_of_several_sequences_is_recorded_alike(served: Served, history: History) -> None:
    sampling = Sampling(temperature=0.5, seed=1, n=3, max_tokens=8)
    async with AsyncClient(served.address) as client:
        stream = client.stream_generate([5], sampling, request_id="r")
        recorded = recorded_async_stream(history, stream, request_id="r", prompt=[5], sampling=sampling)
        assert len([delta async for delta in recorded if delta.finish_reason is not None]) == 3
    key = {"temperature": 0.5, "seed": 1, "n": 3, "max_tokens": 8}
    verdict = verdict_of(history, reference_of([5], sampling=key))
    assert (verdict.violations, verdict.outcomes) == ([], {"finished": 1})
    assert verdict.num_tokens == 24


def test_a_wrong_token_of_a_real_stream_is_found(served: Served, history: History) -> None:
    with Client(served.address) as client:
        stream = client.stream_generate([5], GREEDY, request_id="r")
        list(recorded_stream(history, stream, request_id="r", prompt=[5], sampling=GREEDY))
    wrong = Reference(tokens={reference_key([5], {"temperature": 0.0, "max_tokens": 8}): ((1, 2, 3),)})
    assert [one.kind for one in verdict_of(history, wrong).violations] == ["wrong_token"]


def test_leaving_a_stream_early_is_a_cancellation(served: Served, history: History, engine: ScriptedEngine) -> None:
    sampling = Sampling(max_tokens=400)
    with Client(served.address) as client:
        stream = client.stream_generate([1], sampling, request_id="r")
        recorded = recorded_stream(history, stream, request_id="r", prompt=[1], sampling=sampling)
        next(recorded)
        recorded.close()  # type: ignore[attr-defined]
    assert kinds(history)[-1] == "cancelled"
    assert verdict_of(history).outcomes == {"cancelled": 1}


async def test_leaving_an_asyncio_stream_early_is_a_cancellation(served: Served, history: History) -> None:
    sampling = Sampling(max_tokens=400)
    async with AsyncClient(served.address) as client:
        stream = client.stream_generate([1], sampling, request_id="r")
        recorded = recorded_async_stream(history, stream, request_id="r", prompt=[1], sampling=sampling)
        async for _ in recorded:
            break
        await recorded.aclose()  # type: ignore[attr-defined]
    assert kinds(history)[-1] == "cancelled"


def test_an_error_is_recorded_with_its_reason_and_is_a_violation(
    served: Served, history: History, engine: ScriptedEngine
) -> None:
    engine.fail_at[3] = EngineError("broken", reason="STEP_FAILED")
    with Client(served.address, ConnectOptions(max_attempts=1)) as client:
        stream = client.stream_generate([5], GREEDY, request_id="r")
        with pytest.raises(Llama4Error):
            list(recorded_stream(history, stream, request_id="r", prompt=[5], sampling=GREEDY))
    reason = read_file(history.path)[-1].extra["reason"]
    assert [one.kind for one in verdict_of(history).violations] == ["failed"]
    assert verdict_of(history, allowed_errors=frozenset([reason])).violations == []


def test_a_second_attempt_goes_on_where_the_first_ended(history: History) -> None:
    def attempt(number: int, first: int, stop: int) -> None:
        recorder = Recorder(history, request_id="r", prompt=[5], sampling=GREEDY, attempt=number, first_position=first)
        recorder.submitted()
        for position in range(first, stop):
            recorder.delta(Delta(index=0, token_ids=expected_tokens([5], 8)[position : position + 1]))
        if stop == 8:
            recorder.delta(Delta(index=0, finish_reason=FinishReason.LENGTH))
        else:
            recorder.failed(EngineError("gateway lost", reason="LOST"))

    attempt(0, 0, 3)
    attempt(1, 3, 8)
    reference = reference_of([5], sampling={"temperature": 0.0, "max_tokens": 8})
    assert verdict_of(history, reference).violations == []


def test_an_engine_is_recorded_without_a_gateway(history: History, engine: ScriptedEngine) -> None:
    recorder = EngineHistory(history)
    engine.start(recorder)
    try:
        for index in range(4):
            request = EngineRequest(request_id=f"r{index}", prompt_token_ids=(index,), sampling=GREEDY)
            recorder.submit(engine, request)
        recorder.wait(60)
    finally:
        engine.close()
    sampling = {"temperature": 0.0, "max_tokens": 8}
    verdict = verdict_of(history, reference_of([0], [1], [2], [3], sampling=sampling))
    assert (verdict.violations, verdict.outcomes) == ([], {"finished": 4})


def test_faults_operations_and_epochs_are_recorded_step_by_step(history: History) -> None:
    with victim() as process, history.operation("scale", hosts=3):
        history.epoch(2)
        with history.fault(Stop(process.pid), name="stop expert-0", phase="decode"):
            pass
    assert kinds(history) == [
        "operation_started", "epoch", "fault_injected", "fault_verified", "fault_healed", "operation_ended",
    ]  # fmt: skip
    verdict = verdict_of(history)
    assert [(one.fault.name, one.fault.is_verified) for one in verdict.faults] == [("stop expert-0", True)]
    assert verdict.phases == {"decode": 1}
    assert verdict.operations[0].seconds is not None


def test_a_fault_that_missed_is_recorded_as_not_verified_and_healed(history: History) -> None:
    with victim() as process, victim() as bystander:
        fault = Stop(process.pid, aim=bystander.pid)
        with pytest.raises(FaultNotVerified), history.fault(fault):
            pass
    assert kinds(history) == ["fault_injected", "fault_healed"]
    assert "unverified_fault" in [one.kind for one in verdict_of(history).violations]


def test_lines_are_whole_and_in_order_of_time_whoever_writes(history: History) -> None:
    def write(name: str) -> None:
        for position in range(200):
            history.record(EventKind.TOKEN, request_id=name, index=0, position=position, token_id=1)

    threads = [threading.Thread(target=write, args=(f"r{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    events = read_file(history.path)
    assert len(events) == 800
    assert [event.position for event in events if event.request_id == "r0"] == list(range(200))


def test_a_writer_that_was_killed_leaves_a_readable_file(history: History) -> None:
    history.epoch(1)
    with history.path.open("a") as file:
        file.write(json.dumps({"format": 1, "t": 1})[:-3])
    assert [event.kind for event in read_file(history.path)] == ["epoch"]


def test_an_event_reads_back_as_it_was_written() -> None:
    event = Event(
        t_s=1.5, seed=2, kind=EventKind.SUBMITTED, request_id="r", attempt=1, prompt=(1, 2), sampling={"n": 2}
    )
    assert parse(event.line(), "here") == event


def test_a_fault_free_history_is_a_reference(served: Served, history: History) -> None:
    with Client(served.address) as client:
        stream = client.stream_generate([5], GREEDY, request_id="r")
        list(recorded_stream(history, stream, request_id="r", prompt=[5], sampling=GREEDY))
    found = tokens_of(read_file(history.path), "run")
    assert found == reference_of([5], sampling={"temperature": 0.0, "max_tokens": 8}).tokens
