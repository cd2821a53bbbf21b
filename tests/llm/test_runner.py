"""What the blocking runner does when the engine's queue is full, a request fails, or nothing can ever fit."""

import threading
from typing import Any

import pytest

from llama4_dist import Sampling
from llama4_dist.errors import OverloadedError, UnavailableError
from llama4_dist.llm.runner import Runner
from llama4_dist.request import EngineLimits, EngineRequest, FinishReason, TokenOutput
from llama4_dist.text.request_state import RequestState
from tests.waiting import wait_until

GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
LIMITS = EngineLimits(model="scripted", vocab_size=320, max_context=100, max_waiting=2)


class ScriptedEngine:
    """Holds requests until told what to say; takes `max_waiting` at a time."""

    limits = LIMITS

    def __init__(self) -> None:
        self.live: list[str] = []
        self.most_live = 0
        self.aborted: list[str] = []
        self.error: Exception | None = None

    def start(self, on_outputs: Any) -> None:
        self.on_outputs = on_outputs

    def submit(self, request: EngineRequest) -> None:
        if self.error is not None:
            raise self.error
        if len(self.live) >= LIMITS.max_waiting:
            raise OverloadedError("full", retry_after_s=1.0)
        self.live.append(request.request_id)
        self.most_live = max(self.most_live, len(self.live))

    def abort(self, request_id: str) -> None:
        if request_id in self.live:
            self.live.remove(request_id)
            self.aborted.append(request_id)

    def say(self, **fields: Any) -> None:
        """End the oldest live request with these fields."""
        wait_until(lambda: self.live, "something is submitted")
        self.on_outputs([TokenOutput(request_id=self.live.pop(0), **fields)])


def states(count: int) -> list[RequestState]:
    return [
        RequestState(request_id=f"r{i}", prompt_token_ids=[i], sampling=GREEDY, limits=LIMITS, tokenizer=None)
        for i in range(count)
    ]


def in_thread(act: Any) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_more_requests_than_the_queue_holds_are_fed_as_others_end() -> None:
    engine = ScriptedEngine()
    runner, wanted = Runner(engine), states(5)  # type: ignore[arg-type]
    thread, raised = in_thread(lambda: runner.run(wanted))
    for token_id in range(5):
        engine.say(token_ids=(token_id,), finish_reason=FinishReason.LENGTH)
    thread.join(60)
    assert not thread.is_alive()
    assert raised == []
    assert [state.completion().token_ids for state in wanted] == [(i,) for i in range(5)]
    assert engine.most_live == LIMITS.max_waiting


def test_one_failure_ends_the_call_and_aborts_the_rest() -> None:
    engine = ScriptedEngine()
    runner = Runner(engine)  # type: ignore[arg-type]
    thread, raised = in_thread(lambda: runner.run(states(3)))
    engine.say(error=UnavailableError("no live replica"))
    thread.join(60)
    assert [type(error) for error in raised] == [UnavailableError]
    assert engine.live == []
    assert set(engine.aborted) <= {"r1/0", "r2/0"}
    assert runner._inboxes == {}
    engine.on_outputs([TokenOutput(request_id="r1/0", finish_reason=FinishReason.CANCELLED)])  # has no reader: dropped


def test_a_request_that_can_never_fit_is_not_retried() -> None:
    engine = ScriptedEngine()
    engine.error = OverloadedError("no room", reason="KV_CACHE_EXHAUSTED")
    with pytest.raises(OverloadedError, match="no room"):
        Runner(engine).run(states(1))  # type: ignore[arg-type]
