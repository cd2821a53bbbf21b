import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from llama4_dist.engine.group import EngineGroup
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.port import EngineStats, OnOutputs
from llama4_dist.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from llama4_dist.request import EngineRequest, FinishReason, TokenOutput
from tests.engine.collector import Collector
from tests.engine.fake_model import fake_core, greedy, next_token, tokens
from tests.engine.gate import Gate
from tests.engine.sequences import request
from tests.waiting import wait_until

PROMPT = (5, 9)


class Pair:
    """A group of two engines, started, each with a gate before its model."""

    def __init__(self, **options: Any) -> None:
        self.engines = [LocalEngine(fake_core(**options)) for _ in range(2)]
        self.gates = [Gate(engine.core.runner.model) for engine in self.engines]  # type: ignore[arg-type]
        self.group, self.collector = EngineGroup(self.engines), Collector()
        self.group.start(self.collector)

    def live(self) -> list[int]:
        return [engine.stats().requests_admitted for engine in self.engines]

    def open(self) -> None:
        for gate in self.gates:
            gate.open()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(max_waiting=2, max_num_seqs=1)
    yield pair
    pair.open()
    pair.group.close()


def test_requests_go_to_the_least_loaded_engine(pair: Pair) -> None:
    for i in range(4):
        pair.group.submit(request(f"r{i}", PROMPT, max_tokens=3))
    pair.open()
    pair.collector.wait_for(*(f"r{i}" for i in range(4)))
    assert pair.live() == [2, 2]
    assert all(tokens(pair.collector.outputs[f"r{i}"]) == greedy(PROMPT, 3) for i in range(4))
    stats = pair.group.stats()
    assert (stats.requests_finished, stats.generated_tokens, stats.kv_blocks_total) == (4, 12, 128)


def test_requests_that_begin_alike_go_to_one_engine(pair: Pair) -> None:
    start = tuple(index % 50 for index in range(70))
    pair.group.submit(request("other", PROMPT, max_tokens=2))
    pair.group.submit(request("first", start, max_tokens=2))  # the least loaded is the second engine
    pair.open()
    pair.collector.wait_for("first", "other")
    assert pair.live() == [1, 1]
    for turn in range(3):  # one after the other: nobody has more than its share
        pair.group.submit(request(f"turn{turn}", (*start, turn), max_tokens=2))
        pair.collector.wait_for(f"turn{turn}")
        assert tokens(pair.collector.outputs[f"turn{turn}"]) == greedy((*start, turn), 2)
    assert pair.live() == [1, 4]
    assert pair.group.stats().prefix_hits == 3
    pair.group.submit(request("tenant", (*start, 9), max_tokens=2, tenant="another"))
    pair.collector.wait_for("tenant")
    assert sum(pair.live()) == 6
    assert pair.group.stats().prefix_hits == 3


def test_an_engine_gets_no_more_than_its_share_of_requests_that_begin_alike() -> None:
    pair = Pair(max_waiting=8)
    try:
        start = tuple(index % 50 for index in range(70))
        for turn in range(3):  # all at once: the third would be more than 1.25 times the mean
            pair.group.submit(request(f"turn{turn}", (*start, turn), max_tokens=2))
        pair.open()
        pair.collector.wait_for(*(f"turn{turn}" for turn in range(3)))
        assert pair.live() == [2, 1]
    finally:
        pair.open()
        pair.group.close()


def test_an_engine_that_is_down_is_passed_over(pair: Pair) -> None:
    pair.open()
    pair.engines[0].close()
    for i in range(3):
        pair.group.submit(request(f"r{i}", PROMPT, max_tokens=3))
        pair.collector.wait_for(f"r{i}")
    assert pair.live() == [0, 3]
    assert pair.group.score((1, 2, 3)).argmax(1).tolist() == [next_token((1, 2, 3)[: i + 1]) for i in range(3)]
    pair.engines[1].close()
    with pytest.raises(UnavailableError):
        pair.group.submit(request("none", PROMPT))
    with pytest.raises(UnavailableError):  # the id of a refused request is free
        pair.group.submit(request("none", PROMPT))


def test_a_group_is_full_when_all_its_engines_are(pair: Pair) -> None:
    for i in range(2):
        pair.group.submit(request(f"running{i}", PROMPT, max_tokens=1))
        assert pair.gates[i].entered.wait(60)
    for i in range(4):
        pair.group.submit(request(f"waiting{i}", PROMPT, max_tokens=1))
    with pytest.raises(OverloadedError):
        pair.group.submit(request("more", PROMPT, max_tokens=1))
    pair.open()
    pair.collector.wait_for(*(f"running{i}" for i in range(2)), *(f"waiting{i}" for i in range(4)))


def test_an_id_is_unique_across_the_group_and_abort_finds_its_engine(pair: Pair) -> None:
    for name in ("a", "b"):
        pair.group.submit(request(name, PROMPT, max_tokens=100))
    with pytest.raises(DuplicateRequestError):
        pair.group.submit(request("b", PROMPT))
    pair.group.abort("b")
    pair.group.abort("unknown")
    pair.open()
    assert pair.collector.wait_for("b")[-1].finish_reason is FinishReason.CANCELLED
    assert tokens(pair.collector.wait_for("a")) == greedy(PROMPT, 100)
    pair.collector.forget("b")
    pair.group.submit(request("b", PROMPT, max_tokens=1))
    pair.collector.wait_for("b")


def test_counters_are_summed_over_the_engines_that_answer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> EngineStats:
        raise UnavailableError("the engine died")

    monkeypatch.setattr(pair.engines[0], "stats", dead)
    assert pair.group.stats().kv_blocks_total == 64
    monkeypatch.setattr(pair.engines[1], "stats", dead)
    with pytest.raises(UnavailableError, match="died"):
        pair.group.stats()


class Stepped:
    """Two engines that hold each step until told, in a group; closing one is how it is lost."""

    def __init__(self, **group_options: Any) -> None:
        self.threads_before = set(threading.enumerate())
        self.engines = [LocalEngine(fake_core()) for _ in range(2)]
        self.steps = [Steps(engine) for engine in self.engines]
        self.group, self.collector = EngineGroup(self.engines, **group_options), Collector()
        self.group.start(self.collector)

    def holder(self, request_id: str) -> int:
        """Which engine has the request."""
        self.collector.wait(lambda: any(request_id in engine._live for engine in self.engines))
        return next(index for index, engine in enumerate(self.engines) if request_id in engine._live)

    def lose(self, index: int) -> None:
        closing = threading.Thread(target=self.engines[index].close)
        closing.start()
        wait_until(lambda: self.engines[index]._refusal is not None)
        self.steps[index].open()
        closing.join(60)
        assert not closing.is_alive()

    def threads_since(self, name: str) -> set[threading.Thread]:
        """Threads of that name that were not there when this began: other tests may have left some."""
        return {thread for thread in threading.enumerate() if thread.name == name} - self.threads_before

    def close(self) -> None:
        for steps in self.steps:
            steps.open()
        self.group.close()
        assert not self.threads_since("engine-group"), "a closed group has no thread"


class Steps:
    """Lets an engine's model take as many steps as were granted."""

    def __init__(self, engine: LocalEngine) -> None:
        self._granted = threading.Semaphore(0)
        self._open = threading.Event()
        engine.core.runner.model.before_forward = self._pass  # type: ignore[attr-defined]

    def grant(self, count: int) -> None:
        for _ in range(count):
            self._granted.release()

    def open(self) -> None:
        self._open.set()
        self._granted.release()

    def _pass(self, batch: object) -> None:
        if not self._open.is_set():
            assert self._granted.acquire(timeout=60)


@pytest.fixture
def stepped() -> Iterator[Stepped]:
    stepped = Stepped(replay_timeout_s=5.0)
    yield stepped
    stepped.close()


def said(stepped: Stepped, request_id: str, count: int) -> None:
    stepped.collector.wait(lambda: len(tokens(stepped.collector.outputs.get(request_id, []))) >= count)


SAMPLINGS = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.2}]


def alone(sampling: dict[str, float], max_tokens: int) -> list[int]:
    """The tokens of an engine that is never lost."""
    engine, collector = LocalEngine(fake_core()), Collector()
    engine.start(collector)
    engine.submit(request("alone", PROMPT, max_tokens=max_tokens, **sampling))
    outputs = collector.wait_for("alone")
    engine.close()
    return tokens(outputs)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("num_before", [0, 1, 5])
def test_a_request_goes_on_with_another_engine_when_its_own_is_lost(
    stepped: Stepped, sampling: dict[str, float], num_before: int
) -> None:
    stepped.group.submit(request("r", PROMPT, max_tokens=12, logprobs=0, **sampling))
    first = stepped.holder("r")
    stepped.steps[first].grant(num_before)
    said(stepped, "r", num_before)
    other = 1 - first
    stepped.steps[other].open()
    stepped.lose(first)
    outputs = stepped.collector.wait_for("r")
    assert tokens(outputs) == alone(sampling, 12)
    assert [len(output.logprobs or ()) for output in outputs] == [1] * 12
    assert [output.queue_s is not None for output in outputs] == [True] + [False] * 11
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert stepped.group.stats().requests_replayed == 1
    stats = stepped.engines[other].stats()
    assert (stats.kv_blocks_free, stats.requests_running) == (stats.kv_blocks_total, 0)


def test_log_probabilities_of_the_prompt_come_once(stepped: Stepped) -> None:
    stepped.group.submit(request("r", PROMPT, max_tokens=6, prompt_logprobs=0))
    first = stepped.holder("r")
    stepped.steps[first].grant(2)
    said(stepped, "r", 2)
    stepped.steps[1 - first].open()
    stepped.lose(first)
    outputs = stepped.collector.wait_for("r")
    assert [output.prompt_logprobs is not None for output in outputs] == [True] + [False] * 5


def test_requests_wait_for_an_engine_when_none_is_left(stepped: Stepped) -> None:
    stepped.group.submit(request("r", PROMPT, max_tokens=9))
    first = stepped.holder("r")
    stepped.steps[first].grant(3)
    said(stepped, "r", 3)
    stepped.lose(1 - first)
    stepped.lose(first)
    with pytest.raises(UnavailableError):
        stepped.group.submit(request("new", PROMPT))
    stepped.group.add(LocalEngine(fake_core()), name="later")
    assert tokens(stepped.collector.wait_for("r")) == greedy(PROMPT, 9)
    assert stepped.group.names == ("engine-0", "engine-1", "later")


@pytest.mark.parametrize(
    ("timeout_s", "kind", "reason"),
    [(None, UnavailableError, "WORKER_LOST"), (0.3, DeadlineExceededError, "DEADLINE_EXCEEDED")],
)
def test_what_waits_for_an_engine_ends_at_the_bound_or_its_deadline(
    timeout_s: float | None, kind: type[Exception], reason: str
) -> None:
    stepped = Stepped(replay_timeout_s=0.6)
    stepped.group.submit(replace(request("r", PROMPT, max_tokens=9), timeout_s=timeout_s))
    for index in (1, 0):
        stepped.lose(index)
    error = stepped.collector.wait_for("r")[-1].error
    stepped.close()
    assert isinstance(error, kind)
    assert error.reason == reason


def test_a_request_that_waits_for_an_engine_can_be_cancelled(stepped: Stepped) -> None:
    stepped.group.submit(request("r", PROMPT, max_tokens=9))
    for index in (1, 0):
        stepped.lose(index)
    stepped.group.abort("r")
    assert stepped.collector.wait_for("r")[-1].finish_reason is FinishReason.CANCELLED


def test_a_cancelled_request_is_not_replayed(stepped: Stepped) -> None:
    stepped.group.submit(request("r", PROMPT, max_tokens=9))
    first = stepped.holder("r")
    stepped.group._requests._live["r"].cancelled = True  # the engine is lost before it can say CANCELLED
    stepped.lose(first)
    assert stepped.collector.wait_for("r")[-1].finish_reason is FinishReason.CANCELLED
    assert stepped.engines[1 - first].stats().requests_admitted == 0


def test_a_removed_engine_leaves_its_requests_to_the_others(stepped: Stepped) -> None:
    for name in ("a", "b"):
        stepped.group.submit(request(name, PROMPT, max_tokens=30))
    for steps in stepped.steps:
        steps.grant(3)
    said(stepped, "a", 2)
    said(stepped, "b", 2)
    stepped.steps[1].open()
    stepped.steps[0].open()
    stepped.group.remove("engine-0")
    stepped.collector.wait_for("a", "b")
    assert all(tokens(stepped.collector.outputs[name]) == greedy(PROMPT, 30) for name in ("a", "b"))
    assert stepped.group.names == ("engine-1",)
    with pytest.raises(ValueError, match="engine-0"):
        stepped.group.remove("engine-0")


class Scripted:
    """An engine that takes everything and says what a test has it say."""

    def __init__(self) -> None:
        self.limits = fake_core().limits
        self.submitted: list[EngineRequest] = []
        self.attached: list[str] = []
        self.aborted: list[str] = []
        self.down = False

    def start(self, on_outputs: OnOutputs) -> None:
        self.say = on_outputs

    def submit(self, request: EngineRequest) -> None:
        if self.down:
            raise UnavailableError("down")
        self.submitted.append(request)

    def attach(self, request: EngineRequest) -> None:
        self.attached.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats()

    def close(self) -> None:
        return


class Script:
    def __init__(self, count: int) -> None:
        self.engines = [Scripted() for _ in range(count)]
        self.group, self.collector = EngineGroup(self.engines), Collector()  # type: ignore[arg-type]
        self.group.start(self.collector)

    def say(self, index: int, **fields: Any) -> None:
        self.engines[index].say([TokenOutput(request_id="r", **fields)])

    def lose(self, index: int) -> None:
        self.engines[index].down = True
        self.say(index, error=LOST)

    def holders(self) -> list[int]:
        return [len(engine.submitted) for engine in self.engines]


LOST = UnavailableError("lost", reason="WORKER_LOST")


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script(3)
    yield script
    script.group.close()


def test_an_engine_that_was_lost_says_nothing_more_of_what_it_had(script: Script) -> None:
    script.group.submit(request("r", PROMPT, max_tokens=9))
    script.say(0, token_ids=(1,), queue_s=0.5)
    script.lose(0)
    wait_until(lambda: script.holders() == [1, 1, 0] and script.engines[0].aborted == ["r"])
    assert script.engines[1].submitted[0].output_token_ids == (1,)
    script.say(0, token_ids=(2,))
    script.say(1, token_ids=(3,), queue_s=0.7)
    script.say(1, finish_reason=FinishReason.LENGTH)
    outputs = script.collector.wait_for("r")
    assert tokens(outputs) == [1, 3]
    assert [output.queue_s for output in outputs] == [0.5, None, None]


def test_an_engine_that_lost_a_request_is_asked_last_for_a_while(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take requests and have nothing to compute them with; its load would be the least."""
    script.group.submit(request("r", PROMPT, max_tokens=9))
    script.say(0, error=LOST)
    wait_until(lambda: script.holders() == [1, 1, 0])
    script.group.submit(request("s", (9, 8, 7), max_tokens=9))
    assert script.holders() == [1, 1, 1]
    monkeypatch.setattr("llama4_dist.engine.replayer.AVOIDED_S", 0.0)
    script.group.submit(request("t", (6, 5, 4), max_tokens=9))
    assert script.holders() == [2, 1, 1]


def test_a_request_without_a_seed_is_given_one_that_the_next_engine_draws_by_too(script: Script) -> None:
    script.group.submit(request("r", PROMPT, max_tokens=9, seed=None))
    script.say(0, token_ids=(1,))
    script.lose(0)
    wait_until(lambda: script.holders() == [1, 1, 0])
    first, second = (script.engines[index].submitted[0] for index in range(2))
    assert first.sampling.seed is not None
    assert first.sampling == second.sampling
    assert first.digest == second.digest != b""


def test_the_time_left_is_what_the_next_engine_is_given(script: Script) -> None:
    script.group.submit(replace(request("r", PROMPT, max_tokens=9), timeout_s=60.0))
    script.group._requests._live["r"].submitted_s -= 20.0
    script.lose(0)
    wait_until(lambda: script.holders() == [1, 1, 0])
    assert 39.0 < (script.engines[1].submitted[0].timeout_s or 0) <= 40.0


def test_a_full_queue_is_passed_on_only_when_every_engine_is_full(script: Script) -> None:
    script.group.submit(request("r", PROMPT, max_tokens=9))
    for index in range(3):
        script.say(index, error=OverloadedError(f"full {index}", retry_after_s=index))
        wait_until(lambda index=index: sum(script.holders()) == min(index + 2, 3))  # type: ignore[misc]
    error = script.collector.wait_for("r")[-1].error
    assert isinstance(error, OverloadedError)
    assert script.holders() == [1, 1, 1]


def test_a_request_that_was_taken_once_is_not_refused_by_a_full_queue(script: Script) -> None:
    script.group.submit(request("r", PROMPT, max_tokens=9))
    script.say(0, token_ids=(1,))
    script.lose(0)
    wait_until(lambda: script.holders() == [1, 1, 0])
    script.say(1, error=OverloadedError("full"))
    wait_until(lambda: sum(script.holders()) == 3)
    assert script.collector.outputs["r"][-1].error is None


def test_a_request_that_seems_to_kill_engines_is_given_up(script: Script) -> None:
    script.group.submit(request("r", PROMPT, max_tokens=9))
    for num_lost in range(1, 9):
        holder = next(live.member for live in script.group._requests._live.values())
        assert holder is not None
        holder.engine.say([TokenOutput(request_id="r", error=LOST)])  # type: ignore[attr-defined]
        wait_until(lambda num_lost=num_lost: sum(script.holders()) == num_lost + 1)  # type: ignore[misc]
    holder = next(live.member for live in script.group._requests._live.values())
    assert holder is not None
    holder.engine.say([TokenOutput(request_id="r", error=LOST)])  # type: ignore[attr-defined]
    assert script.collector.wait_for("r")[-1].error is LOST


def test_the_first_engine_that_has_a_request_keeps_it_and_a_second_lets_go(script: Script) -> None:
    script.group.attach(request("r", PROMPT, max_tokens=9))
    assert [engine.attached for engine in script.engines] == [["r"]] * 3
    script.say(0, error=NotFoundError("none"))
    script.say(1, token_ids=(4, 5), attached_tokens=2)
    script.say(2, token_ids=(4,), attached_tokens=1)
    wait_until(lambda: script.engines[2].aborted == ["r"])
    script.lose(1)
    wait_until(lambda: sum(script.holders()) == 1)
    assert [one.output_token_ids for engine in script.engines for one in engine.submitted] == [(4, 5)]
    assert tokens(script.collector.outputs["r"]) == [4, 5]


def test_an_attach_that_finds_nothing_ends_as_not_found(script: Script) -> None:
    script.group.attach(request("r", PROMPT, max_tokens=9))
    for index in range(2):
        script.say(index, error=NotFoundError("none"))
    script.group.remove("engine-2")
    assert isinstance(script.collector.wait_for("r")[-1].error, NotFoundError)
    local, collector = LocalEngine(fake_core()), Collector()
    local.start(collector)
    local.attach(request("r", PROMPT))
    assert isinstance(collector.wait_for("r")[-1].error, NotFoundError)
    local.close()
