from collections.abc import Iterator

import pytest

from llama4_dist.engine.group import EngineGroup
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.port import EngineStats
from llama4_dist.errors import DuplicateRequestError, OverloadedError, UnavailableError
from llama4_dist.request import FinishReason
from tests.engine.collector import Collector
from tests.engine.fake_model import fake_core, greedy, next_token, tokens
from tests.engine.gate import Gate
from tests.engine.sequences import request

PROMPT = (5, 9)


class Pair:
    """A group of two engines, started, each with a gate before its model."""

    def __init__(self, **options: int) -> None:
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
        assert pair.gates[i].entered.wait(10.0)
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
