import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from llama4_dist import stations
from llama4_dist.engine.local import LocalEngine
from llama4_dist.errors import DuplicateRequestError, EngineError, OverloadedError, UnavailableError
from llama4_dist.request import FinishReason
from tests.engine.collector import Collector
from tests.engine.fake_model import FakeModel, fake_core, greedy, next_token, tokens
from tests.engine.gate import Gate
from tests.engine.sequences import request

Start = Callable[..., tuple[LocalEngine, Collector, FakeModel]]
PROMPT = (5, 9)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an engine over a fake core with these options; it is closed after the test."""
    engines: list[LocalEngine] = []

    def make(**options: Any) -> tuple[LocalEngine, Collector, FakeModel]:
        core = fake_core(**options)
        engine, collector = LocalEngine(core), Collector()
        engines.append(engine)
        engine.start(collector)
        assert isinstance(core.runner.model, FakeModel)
        return engine, collector, core.runner.model

    yield make
    for engine in engines:
        engine.close()


def test_requests_of_several_threads_are_answered_from_one(start: Start) -> None:
    engine, collector, _ = start()
    prompts = {f"r{i}": (i, i + 1, i + 2) for i in range(12)}

    def submit(name: str) -> None:
        engine.submit(request(name, prompts[name], max_tokens=10))

    threads = [threading.Thread(target=submit, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    collector.wait_for(*prompts)
    for name, prompt in prompts.items():
        assert tokens(collector.outputs[name]) == greedy(prompt, 10)
    assert len(collector.threads) == 1
    # At most one call per step: a step's outputs name each request once.
    assert all(len({output.request_id for output in call}) == len(call) for call in collector.calls)


def test_a_running_id_is_refused_and_free_again_after_its_end(start: Start) -> None:
    engine, collector, model = start()
    gate = Gate(model)
    engine.submit(request("a", PROMPT, max_tokens=2))
    with pytest.raises(DuplicateRequestError):
        engine.submit(request("a", PROMPT))
    gate.open()
    collector.wait_for("a")
    collector.forget("a")
    engine.submit(request("a", PROMPT, max_tokens=2))
    assert tokens(collector.wait_for("a")) == greedy(PROMPT, 2)


def test_a_full_queue_refuses_and_says_when_to_come_back(start: Start) -> None:
    engine, collector, model = start(max_waiting=2, max_num_seqs=1)
    gate = Gate(model)
    engine.submit(request("running", PROMPT, max_tokens=3))
    assert gate.entered.wait(60)
    engine.submit(request("w0", PROMPT, max_tokens=3))
    engine.submit(request("w1", PROMPT, max_tokens=3))
    with pytest.raises(OverloadedError) as caught:
        engine.submit(request("w2", PROMPT, max_tokens=3))
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s is not None
    assert 0.1 <= caught.value.retry_after_s <= 60.0
    gate.open()
    collector.wait_for("running", "w0", "w1")
    assert "w2" not in collector.outputs
    engine.submit(request("w2", PROMPT, max_tokens=3))
    assert tokens(collector.wait_for("w2")) == greedy(PROMPT, 3)


def test_an_abort_takes_effect_before_the_next_step(start: Start) -> None:
    engine, collector, model = start()
    gate = Gate(model)
    engine.submit(request("a", PROMPT, max_tokens=100))
    assert gate.entered.wait(60)
    for _ in range(1000):
        engine.abort("a")
        engine.abort("unknown")
    assert engine._inbox.qsize() == 1  # the queue is bounded whatever callers do
    gate.open()
    outputs = collector.wait_for("a")
    assert outputs[-1].finish_reason is FinishReason.CANCELLED
    assert len(tokens(outputs)) == 1  # the step that was running; none after
    engine.abort("a")
    stats = engine.stats()
    assert (stats.kv_blocks_free, stats.steps) == (stats.kv_blocks_total, 1)
    assert (stats.requests_admitted, stats.requests_cancelled) == (1, 1)


def test_scoring_runs_between_the_steps_of_running_requests(start: Start) -> None:
    engine, collector, _ = start()
    engine.submit(request("a", PROMPT, max_tokens=100))
    text = tuple(range(30))
    for chunk_size in (None, 1, 7):
        logits_TV = engine.score(text, chunk_size=chunk_size)
        assert logits_TV.argmax(1).tolist() == [next_token(text[: i + 1]) for i in range(30)]
    assert tokens(collector.wait_for("a")) == greedy(PROMPT, 100)
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_a_score_that_fails_raises_in_the_caller_and_gives_its_blocks_back(start: Start) -> None:
    engine, _, model = start()

    def unreachable(batch: object) -> None:
        raise UnavailableError("no live replica", reason="EXPERT_UNREACHABLE")

    model.before_forward = unreachable
    with pytest.raises(UnavailableError, match="no live replica"):
        engine.score((1, 2, 3))
    model.before_forward = lambda batch: None
    assert engine.score((1, 2, 3)).shape == (3, 97)
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_an_action_between_steps_runs_on_the_engines_thread(start: Start) -> None:
    engine, collector, _ = start()
    engine.submit(request("a", PROMPT, max_tokens=2))
    collector.wait_for("a")
    assert {engine.between_steps(threading.get_ident)} == collector.threads
    with pytest.raises(ZeroDivisionError):
        engine.between_steps(lambda: 1 // 0)
    assert engine.between_steps(lambda: 5) == 5


def test_close_fails_what_runs_as_retriable(start: Start) -> None:
    engine, collector, model = start(max_num_seqs=1)
    gate = Gate(model)
    for name in ("running", "waiting"):
        engine.submit(request(name, PROMPT, max_tokens=100))
    assert gate.entered.wait(60)
    threading.Timer(0.05, gate.open).start()
    engine.close()
    for name in ("running", "waiting"):
        error = collector.wait_for(name)[-1].error
        assert isinstance(error, UnavailableError)
        assert error.reason == "DRAINING"
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
    for refused in (lambda: engine.submit(request("b")), lambda: engine.score((1,))):
        with pytest.raises(UnavailableError):
            refused()
    engine.close()


def test_who_waits_for_a_score_hears_of_the_end(start: Start) -> None:
    engine, _, model = start()
    gate = Gate(model)
    errors: list[BaseException] = []

    def score() -> None:
        try:
            engine.score(tuple(range(30)), chunk_size=1)
        except UnavailableError as error:
            errors.append(error)

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert gate.entered.wait(60)
    threading.Timer(0.05, gate.open).start()
    engine.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(errors) == 2
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total


def test_close_can_let_running_requests_end(start: Start) -> None:
    engine, collector, _ = start()
    engine.submit(request("a", PROMPT, max_tokens=50))
    engine.close(drain_timeout_s=10.0)
    assert tokens(collector.wait_for("a")) == greedy(PROMPT, 50)


def test_an_engine_that_was_not_started_refuses() -> None:
    engine = LocalEngine(fake_core())
    with pytest.raises(UnavailableError, match="not been started"):
        engine.submit(request("a"))
    engine.close()
    with pytest.raises(ValueError, match="once"):
        engine.start(Collector())


def test_an_engine_is_started_once(start: Start) -> None:
    engine, collector, _ = start()
    with pytest.raises(ValueError, match="once"):
        engine.start(collector)
    engine.close()
    with pytest.raises(ValueError, match="once"):
        engine.start(collector)
    with pytest.raises(UnavailableError):
        engine.submit(request("a"))


def test_a_dead_thread_fails_what_is_live_and_refuses_the_rest(start: Start) -> None:
    engine, collector, model = start()
    gate = Gate(model)
    engine.submit(request("a", PROMPT, max_tokens=9))
    assert gate.entered.wait(60)
    engine.core.scheduler.schedule = None  # type: ignore[assignment, method-assign]  # a bug of ours, simulated
    gate.open()
    assert isinstance(collector.wait_for("a")[-1].error, EngineError)
    with pytest.raises(UnavailableError, match="died"):
        engine.submit(request("b"))
    with pytest.raises(UnavailableError, match="died"):
        engine.score((1, 2))
    with pytest.raises(UnavailableError, match="died"):
        engine.stats()


def test_a_caller_that_raises_in_its_callback_does_not_stop_the_engine() -> None:
    core = fake_core()
    engine, collector = LocalEngine(core), Collector()
    failures = [True]

    def on_outputs(outputs: Any) -> None:
        collector(outputs)
        if failures:
            failures.pop()
            raise RuntimeError("the caller's own bug")

    engine.start(on_outputs)
    engine.submit(request("a", PROMPT, max_tokens=5))
    assert tokens(collector.wait_for("a")) == greedy(PROMPT, 5)
    engine.close()


def test_a_callback_that_would_wait_for_its_own_engine_is_refused() -> None:
    engine, collector = LocalEngine(fake_core()), Collector()
    refused: list[ValueError] = []

    def on_outputs(outputs: Any) -> None:
        try:
            engine.score((1, 2))
        except ValueError as error:
            refused.append(error)
        collector(outputs)

    engine.start(on_outputs)
    engine.submit(request("a", PROMPT, max_tokens=1))
    collector.wait_for("a")
    engine.close()
    assert len(refused) == 1


def test_an_idle_engine_uses_no_processor_time(start: Start) -> None:
    engine, collector, _ = start()
    engine.submit(request("a", PROMPT, max_tokens=2))
    collector.wait_for("a")
    steps = engine.stats().steps
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.05
    assert engine.stats().steps == steps


def test_ten_thousand_aborts_and_refusals_leave_nothing_behind(start: Start) -> None:
    engine, collector, model = start(max_waiting=50)
    for number in range(5000):
        name = f"r{number}"
        try:
            engine.submit(request(name, PROMPT, max_tokens=100))
        except OverloadedError:
            collector.wait(lambda: True)
        engine.abort(name)
    gate = Gate(model)
    refused = 0
    for number in range(5000):
        try:
            engine.submit(request(f"s{number}", PROMPT, max_tokens=100))
        except OverloadedError:
            refused += 1
    assert refused >= 5000 - 50 - 8 - 8
    for number in range(5000):
        engine.abort(f"s{number}")
    gate.open()
    collector.wait(lambda: not engine._live)
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert (stats.requests_running, stats.requests_waiting) == (0, 0)
    assert stats.requests_admitted == stats.requests_finished + stats.requests_cancelled + stats.requests_failed
    assert stats.requests_failed == 0
    assert (engine._live, engine._aborting, engine._pending) == (set(), set(), set())


def test_stats_balance_while_running(start: Start) -> None:
    engine, collector, model = start(max_num_seqs=2)
    gate = Gate(model)
    for i in range(5):
        engine.submit(request(f"r{i}", PROMPT, max_tokens=3))
    assert gate.entered.wait(60)
    stats = engine.stats()
    assert stats.requests_running >= 1
    gate.open()
    collector.wait_for(*(f"r{i}" for i in range(5)))
    stats = engine.stats()
    assert (stats.requests_admitted, stats.requests_finished) == (5, 5)
    assert (stats.prompt_tokens, stats.generated_tokens) == (10, 15)
    assert stats.max_queue_age_s == 0.0
    assert set(stats.station_seconds) == set(stations.NAMES)
    assert sum(stations.buckets(stats.station_steps, "model")) == stats.steps


def test_callers_of_many_threads_at_once_lose_nothing(start: Start) -> None:
    engine, collector, _ = start(num_blocks=12, max_num_seqs=4, max_waiting=20)
    outcomes: dict[str, str] = {}

    def call(thread: int) -> None:
        random = Random(thread)
        for number in range(40):
            name = f"t{thread}-{number}"
            try:
                engine.submit(request(name, (thread, number), max_tokens=random.randint(1, 30)))
                outcomes[name] = "accepted"
            except OverloadedError:
                outcomes[name] = "refused"
            if random.random() < 0.4:
                engine.abort(f"t{thread}-{random.randint(0, number)}")
            if random.random() < 0.05:
                assert engine.score(tuple(range(20))).shape == (20, 97)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    accepted = [name for name, outcome in outcomes.items() if outcome == "accepted"]
    assert len(outcomes) == 240, "a thread ended early"
    assert len(accepted) > 20
    collector.wait_for(*accepted)
    assert set(collector.outputs) == set(accepted)
    for name in accepted:
        got = tokens(collector.outputs[name])
        thread_number, number = map(int, name[1:].split("-"))
        assert got == greedy((thread_number, number), len(got))
        assert collector.outputs[name][-1].error is None
    stats = engine.stats()
    assert stats.requests_admitted == len(accepted) == stats.requests_finished + stats.requests_cancelled
    assert stats.kv_blocks_free == stats.kv_blocks_total
