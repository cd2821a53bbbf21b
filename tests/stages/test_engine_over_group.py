"""An engine whose model is a group in this process says what one member says, and goes on after the group was lost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError, UnavailableError
from llama4_dist.model.kv_layout import page_bytes
from llama4_dist.partition import WHOLE, Partition
from llama4_dist.request import TokenOutput
from llama4_dist.stages.ports import worker_lost
from tests.checkpoints import make_checkpoint
from tests.engine.collector import Collector
from tests.engine.fake_model import FakeModel, fake_core, greedy, run, tokens
from tests.engine.sequences import request

PROMPTS = {f"p{length}": tuple((7 * i + length) % 256 for i in range(length)) for length in (1, 5, 16, 17, 60)}
Say = Callable[..., dict[str, list[int]]]


@pytest.fixture(scope="module", params=["scout", "maverick", "topk2"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def say(model_dir: Path) -> Iterator[Say]:
    """Have a fresh engine answer all prompts greedily; `say.engine` is the last engine."""
    engines: list[LocalEngine] = []

    def answers(partition: Partition, **options: Any) -> dict[str, list[int]]:
        fields = {"num_blocks": 300, "debug_invariants": True} | options
        engine = build_single_process(model_dir, partition=partition, options=EngineOptions(**fields), num_threads=1)
        engines.append(engine)
        collector = Collector()
        engine.start(collector)
        for name, prompt in PROMPTS.items():
            engine.submit(request(name, prompt, max_tokens=24, ignore_eos=True))
        collector.wait_for(*PROMPTS)
        say_engine = engine.stats()
        assert say_engine.kv_blocks_free == say_engine.kv_blocks_total
        answers.preemptions = say_engine.preemptions  # type: ignore[attr-defined]
        answers.engine = engine  # type: ignore[attr-defined]
        return {name: tokens(outputs) for name, outputs in collector.outputs.items()}

    yield answers
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("cut", [(2, 1), (4, 1), (1, 2), (2, 2)], ids=str)
def test_greedy_tokens_are_those_of_one_member_however_they_are_batched(say: Say, cut: tuple[int, int]) -> None:
    partition = Partition(num_stages=cut[0], num_ranks=cut[1])
    whole = say(WHOLE)
    assert say(partition) == whole
    assert say(partition, max_num_seqs=1, enable_prefix_caching=False) == whole
    assert say(partition, max_num_batched_tokens=11, max_num_seqs=5) == whole


def test_int8_weights_and_a_narrow_cache_are_cut_too(model_dir: Path) -> None:
    """Stages change no bit of int8 either; ranks quantise their own part, so their tokens are their own."""
    said = []
    for partition in (WHOLE, Partition(num_stages=2), Partition(num_ranks=2)):
        engine = build_single_process(
            model_dir,
            weights="int8",
            partition=partition,
            options=EngineOptions(num_blocks=300, kv_dtype="bfloat16"),
            num_threads=1,
        )
        collector = Collector()
        engine.start(collector)
        engine.submit(request("r", PROMPTS["p60"], max_tokens=8, ignore_eos=True))
        collector.wait_for("r")
        said.append(tokens(collector.outputs["r"]))
        engine.close()
    assert said[0] == said[1]
    assert len(said[2]) == 8


def test_pages_that_run_out_change_no_token(say: Say) -> None:
    partition = Partition(num_stages=2, num_ranks=2)
    roomy = say(partition)
    layout = say.engine.core.scheduler.layout  # type: ignore[attr-defined]
    tight = layout.max_pages(84, 16) + 4
    assert say(partition, num_blocks=tight) == roomy
    assert say.preemptions > 0  # type: ignore[attr-defined]


def test_nothing_is_in_flight_while_an_action_runs_between_steps(model_dir: Path) -> None:
    """And what was is not lost: the tokens are those of an engine that nobody interrupts."""
    said = []
    for interrupted in (False, True):
        engine = build_single_process(
            model_dir, partition=Partition(num_stages=2), options=EngineOptions(num_blocks=300), num_threads=1
        )
        collector, seen = Collector(), list[int]()
        engine.start(collector)
        for name, prompt in PROMPTS.items():
            engine.submit(request(name, prompt, max_tokens=40, ignore_eos=True))
        flight = engine.core.flight
        while interrupted and len(seen) < 20:
            seen.append(engine.between_steps(lambda flight=flight: flight.num_steps))  # type: ignore[misc]
        collector.wait_for(*PROMPTS)
        engine.close()
        assert not any(seen)
        said.append({name: tokens(outputs) for name, outputs in collector.outputs.items()})
    assert said[0] == said[1]


def test_an_engine_closes_while_steps_are_in_flight(model_dir: Path) -> None:
    engine = build_single_process(
        model_dir, partition=Partition(num_stages=2), options=EngineOptions(num_blocks=300), num_threads=1
    )
    collector = Collector()
    engine.start(collector)
    for name in ("a", "b", "c"):
        engine.submit(request(name, PROMPTS["p16"], max_tokens=200, ignore_eos=True))
    engine.between_steps(lambda: None)
    engine.close()
    collector.wait_for("a", "b", "c")
    for outputs in collector.outputs.values():
        assert isinstance(outputs[-1].error, UnavailableError)
        assert outputs[-1].error.reason == "DRAINING"


def test_scores_are_those_of_one_member(model_dir: Path) -> None:
    scores = []
    for partition in (WHOLE, Partition(num_stages=2)):
        engine = build_single_process(
            model_dir, partition=partition, options=EngineOptions(num_blocks=300), num_threads=1
        )
        engine.start(lambda outputs: None)
        scores.append(engine.score(PROMPTS["p60"], chunk_size=23))
        engine.close()
    assert scores[0].equal(scores[1])


def test_kv_cache_bytes_are_each_members_own(model_dir: Path) -> None:
    """A page holds a member's layers of a group and its key heads: the same bytes are more pages."""
    partition = Partition(num_stages=2, num_ranks=2)
    options = EngineOptions(kv_cache_bytes=1 << 16, max_context=64)
    engine = build_single_process(model_dir, partition=partition, options=options, num_threads=1)
    config = Checkpoint.open(model_dir).config
    core = engine.core
    assert core.runner._cache.num_bytes == 0, "the leader holds keys"
    members = [plan._member.runner._cache for plan in core.runner.model._plans]  # type: ignore[attr-defined]
    assert len(members) == 4
    assert {cache.num_pages for cache in members} == {core.options.num_blocks}
    assert max(cache.num_bytes for cache in members) <= 1 << 16
    one_head = page_bytes(config, block_size=16, dtype_bytes=4, layout=members[0].layout) // config.num_kv_heads
    assert core.options.num_blocks == (1 << 16) // one_head
    engine.close()


def test_a_model_that_cannot_be_cut_so_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="num_ranks=3 does not divide num_heads"):
        build_single_process(model_dir, partition=Partition(num_ranks=3))


def test_what_runs_ends_when_the_group_is_lost_and_what_waits_is_computed_by_the_next() -> None:
    core = fake_core(max_num_seqs=1)
    model = core.runner.model
    assert isinstance(model, FakeModel)
    core.add(request("runs", (1, 2, 3), max_tokens=5))
    core.add(request("waits", (4, 5), max_tokens=5))
    core.step()
    model.before_forward = _lost
    (ended,) = core.step()
    assert ended.request_id == "runs"
    assert isinstance(ended.error, UnavailableError)
    assert ended.error.reason == "WORKER_LOST"
    assert core.step() == [], "a step was computed without a group"
    model.before_forward = lambda batch: None
    core.renew()
    outputs = run(core)
    assert tokens(outputs["waits"]) == greedy((4, 5), 5)
    assert set(outputs) == {"waits"}


def test_a_prefix_that_a_lost_group_computed_is_not_found_again() -> None:
    core = fake_core()
    prompt = tuple(range(20))
    core.add(request("first", prompt, max_tokens=2))
    run(core)
    core.lose(worker_lost("a member died"))
    core.renew()
    core.add(request("second", prompt, max_tokens=2))
    run(core)
    assert core.scheduler.num_prefix_hits == 0


def test_what_runs_when_a_group_is_exchanged_ends_and_leaves_no_prefix() -> None:
    """Nobody may have noticed the loss: a score found it, or no step ran since."""
    core = fake_core()
    prompt = tuple(range(20))
    core.add(request("runs", prompt, max_tokens=9))
    core.step()
    core.step()
    (ended,) = core.renew()
    assert isinstance(ended.error, UnavailableError)
    core.add(request("second", prompt, max_tokens=2))
    assert tokens(run(core)["second"]) == greedy(prompt, 2)
    assert core.scheduler.num_prefix_hits == 0


def test_an_engine_goes_on_when_its_group_is_formed_anew() -> None:
    """What waits is computed by the new group; what came while there was none, too."""
    engine, collector = LocalEngine(fake_core(max_num_seqs=1)), Collector()
    model = engine.core.runner.model
    assert isinstance(model, FakeModel)
    model.before_forward = _lost
    engine.start(collector)
    engine.submit(request("first", (1, 2), max_tokens=3))
    collector.wait_for("first")
    engine.submit(request("waits", (3, 4), max_tokens=3))
    engine.renew(lambda: setattr(model, "before_forward", lambda batch: None))
    collector.wait_for("waits")
    assert tokens(collector.outputs["waits"]) == greedy((3, 4), 3)
    engine.lose(worker_lost("a member died while nothing ran"))
    engine.submit(request("later", (5, 6), max_tokens=3))
    engine.renew(lambda: None)
    collector.wait_for("later")
    assert tokens(collector.outputs["later"]) == greedy((5, 6), 3)
    engine.close()


def test_who_waits_for_a_group_too_long_is_told_to_retry() -> None:
    now_s = [0.0]
    core = fake_core(clock=lambda: now_s[0], expert_timeout_s=30.0)
    core.lose(worker_lost("a member died"))
    core.add(request("waits", (1, 2), max_tokens=5))
    outputs: list[TokenOutput] = core.step()
    assert outputs == []
    now_s[0] = 31.0
    (ended,) = core.step()
    assert isinstance(ended.error, UnavailableError)
    assert ended.error.reason == "WORKER_LOST"
    assert not core.has_work


def _lost(batch: object) -> None:
    raise worker_lost("a member died")
