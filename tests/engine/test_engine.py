import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from llama4_dist.engine import scorer
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.snapshot import snapshot
from llama4_dist.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from llama4_dist.model.batch import Batch
from llama4_dist.request import FinishReason
from tests.engine.fake_model import (
    EOS,
    VOCAB_SIZE,
    FakeDispatcher,
    FakeModel,
    fake_core,
    greedy,
    next_token,
    run,
    tokens,
)
from tests.engine.sequences import request

PROMPTS = {"a": (5, 9), "b": tuple(range(40, 63)), "c": (1,), "d": (80, 3, 80, 3, 80, 3, 2)}


def balanced(core: EngineCore) -> bool:
    c = core.counters
    return c.admitted == c.finished + c.cancelled + c.failed + len(core.scheduler.live())


def model(core: EngineCore) -> FakeModel:
    assert isinstance(core.runner.model, FakeModel)
    return core.runner.model


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 8}, {"max_num_seqs": 1}, {"num_blocks": 14}])
def test_every_way_of_scheduling_gives_the_same_tokens(options: dict[str, Any]) -> None:
    core = fake_core(**options)
    for name, prompt in PROMPTS.items():
        core.add(request(name, prompt, max_tokens=20))
    outputs = run(core)
    for name, prompt in PROMPTS.items():
        assert tokens(outputs[name]) == greedy(prompt, 20)
        assert [o.finish_reason for o in outputs[name]] == [None] * 19 + [FinishReason.LENGTH]
    assert (core.scheduler.num_preemptions > 0) == (options == {"num_blocks": 14})
    assert core.scheduler.allocator.num_free == core.scheduler.allocator.num_pages
    assert balanced(core)
    assert core.counters.generated_tokens == 80
    assert core.counters.prompt_tokens == sum(map(len, PROMPTS.values()))


def test_only_rows_that_are_sampled_get_logits() -> None:
    core = fake_core()
    core.add(request("long", tuple(range(20)), max_tokens=3))
    run(core)
    assert [batch.logit_rows for batch in model(core).batches] == [(), (3,), (0,), (0,)]


def test_an_end_token_stops_and_is_part_of_the_output() -> None:
    first, second, third = greedy((5, 9), 3)
    core = fake_core()
    core.add(request("stop", (5, 9), stop_token_ids=(third,), max_tokens=9))
    core.add(request("eos", (5, 9), logit_bias={EOS: 100.0}))
    core.add(request("ignore", (5, 9), logit_bias={EOS: 100.0}, ignore_eos=True, max_tokens=2))
    core.add(request("min", (5, 9), logit_bias={EOS: 100.0}, min_tokens=2))
    outputs = run(core)
    assert tokens(outputs["stop"]) == [first, second, third]
    assert (outputs["stop"][-1].finish_reason, outputs["stop"][-1].stop_token_id) == (FinishReason.STOP, third)
    assert tokens(outputs["eos"]) == [EOS]
    assert tokens(outputs["ignore"]) == [EOS, EOS]
    assert outputs["ignore"][-1].finish_reason is FinishReason.LENGTH
    assert tokens(outputs["min"]) == [first, second, EOS]


def test_a_full_context_ends_a_sequence() -> None:
    core = fake_core(max_context=10)
    core.add(request("all", (5, 9), max_tokens=None))
    core.add(request("more", (5, 9), max_tokens=50))
    outputs = run(core)
    for name in ("all", "more"):
        assert tokens(outputs[name]) == greedy((5, 9), 8)
        assert outputs[name][-1].finish_reason is FinishReason.LENGTH


def test_a_prompt_that_no_empty_cache_holds_is_refused_before_it_starts() -> None:
    core = fake_core(num_blocks=3, max_context=128)
    with pytest.raises(OverloadedError) as caught:
        core.add(request("big", tuple(range(12))))
    assert caught.value.reason == "KV_CACHE_EXHAUSTED"
    assert core.counters.admitted == 0
    core.add(request("fits", tuple(range(11)), max_tokens=5))
    assert len(tokens(run(core)["fits"])) == 1


@pytest.mark.parametrize("emitted", [0, 7, 19])
def test_a_replay_continues_as_if_nothing_had_happened(emitted: int) -> None:
    fields = {
        "temperature": 3.0,
        "seed": 11,
        "allowed_token_ids": tuple(range(6)),  # tokens come again, so penalties count
        "frequency_penalty": 4.0,
        "repetition_penalty": 1.3,
        "max_tokens": 20,
    }
    whole_core = fake_core()
    whole_core.add(request("whole", (5, 9), **fields))
    whole = tokens(run(whole_core)["whole"])
    core = fake_core()
    core.add(request("rest", (5, 9), output_token_ids=tuple(whole[:emitted]), **fields))
    outputs = run(core)["rest"]
    assert tokens(outputs) == whole[emitted:]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_replay_that_was_complete_ends_without_a_token() -> None:
    core = fake_core()
    (output,) = core.add(request("done", (5, 9), output_token_ids=(3, 4), max_tokens=2))
    assert (output.token_ids, output.finish_reason) == ((), FinishReason.LENGTH)
    assert balanced(core)
    assert not core.has_work


def test_a_seeded_draw_is_the_same_alone_and_in_a_batch() -> None:
    fields: dict[str, Any] = {"ignore_eos": True, "max_tokens": 12}

    def draw(names: list[str]) -> dict[str, list[int]]:
        core = fake_core(max_num_batched_tokens=8 * len(names))
        for i, name in enumerate(names):
            core.add(request(name, PROMPTS["d"], temperature=8.0, seed=ord(name), sequence_index=i % 2, **fields))
        return {name: tokens(outputs) for name, outputs in run(core).items()}

    together = draw(["a", "b", "c", "d"])
    assert together["a"] == draw(["a"])["a"]
    assert together["c"] == draw(["c"])["c"]
    assert len(set(map(tuple, together.values()))) == 4
    assert draw(["b"])["b"] != together["b"]  # another sequence index is another sequence


def test_two_requests_without_a_seed_differ() -> None:
    core = fake_core()
    for name in "ab":
        core.add(request(name, (5, 9), temperature=50.0, seed=None, ignore_eos=True, max_tokens=12))
    outputs = run(core)
    assert tokens(outputs["a"]) != tokens(outputs["b"])


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 8])
def test_an_abort_frees_the_blocks_at_once_and_says_so_once(num_steps: int) -> None:
    core = fake_core()
    core.add(request("a", tuple(range(30)), max_tokens=20))
    for _ in range(num_steps):
        core.step()
    (output,) = core.abort("a")
    assert (output.finish_reason, output.token_ids) == (FinishReason.CANCELLED, ())
    assert core.scheduler.allocator.num_free == 64
    assert core.abort("a") == []
    assert core.step() == []
    assert balanced(core)


def test_a_late_request_ends_at_the_next_step_wherever_it_is() -> None:
    now = [0.0]
    core = fake_core(clock=lambda: now[0], max_num_seqs=1)
    core.add(request("running", (5, 9), timeout_s=10.0))
    core.add(request("waiting", (5, 9), timeout_s=5.0))
    core.add(request("patient", (5, 9), max_tokens=1))
    core.step()
    now[0] = 5.0
    late, token = core.step()
    assert late.request_id == "waiting"
    assert isinstance(late.error, DeadlineExceededError)
    assert token.request_id == "running"
    now[0] = 10.0
    late, patient = core.step()
    assert isinstance(late.error, DeadlineExceededError)
    assert late.request_id == "running"
    assert patient.finish_reason is FinishReason.LENGTH
    assert patient.queue_s == 10.0
    assert core.scheduler.allocator.num_free == 64
    assert balanced(core)


def lose_an_expert(core: EngineCore) -> None:
    def unreachable(batch: object) -> None:
        raise UnavailableError("expert 3 of layer 1 has no live replica", reason="EXPERT_UNREACHABLE")

    model(core).before_forward = unreachable


def test_a_step_without_an_expert_is_held_and_computed_when_it_is_back() -> None:
    now = [0.0]
    core = fake_core(max_num_seqs=2, clock=lambda: now[0])
    for name in "abc":
        core.add(request(name, (5, 9), max_tokens=4))
    first = core.step()
    lose_an_expert(core)
    for _ in range(20):
        now[0] += 1.0
        assert core.step() == []
    assert core.held_since_s == 1.0
    model(core).before_forward = lambda batch: None
    outputs = [*first, *(output for each in run(core).values() for output in each)]
    for name in "abc":
        assert tokens([output for output in outputs if output.request_id == name]) == greedy((5, 9), 4)
    assert core.held_since_s is None
    assert balanced(core)


def test_a_held_request_can_be_aborted_and_meets_its_deadline() -> None:
    now = [0.0]
    core = fake_core(clock=lambda: now[0])
    core.add(request("a", (5, 9), max_tokens=4))
    core.add(replace(request("b", (5, 9), max_tokens=4), timeout_s=5.0))
    lose_an_expert(core)
    assert core.step() == []
    assert core.abort("a")[0].finish_reason is FinishReason.CANCELLED
    now[0] = 6.0
    (late,) = core.step()
    assert isinstance(late.error, DeadlineExceededError)
    assert core.scheduler.allocator.num_free == 64


def test_an_expert_that_stays_away_fails_the_requests_of_that_step_only() -> None:
    now = [0.0]
    core = fake_core(max_num_seqs=2, clock=lambda: now[0])
    for name in "abc":
        core.add(request(name, (5, 9), max_tokens=4))
    core.step()
    lose_an_expert(core)
    assert core.step() == []
    now[0] += core.options.expert_timeout_s
    outputs = core.step()
    assert [(o.request_id, o.error and o.error.reason) for o in outputs] == [
        ("a", "EXPERT_UNREACHABLE"),
        ("b", "EXPERT_UNREACHABLE"),
    ]
    assert core.scheduler.allocator.num_free == 64
    model(core).before_forward = lambda batch: None
    assert tokens(run(core)["c"]) == greedy((5, 9), 4)
    assert balanced(core)


def test_any_other_failure_of_a_step_fails_what_runs_and_leaves_a_usable_engine() -> None:
    core = fake_core(max_num_batched_tokens=8)
    core.add(request("a", (5, 9), max_tokens=4))
    core.add(request("b", tuple(range(30)), max_tokens=4))
    core.step()

    def broken(batch: object) -> None:
        raise ZeroDivisionError("secret detail")

    model(core).before_forward = broken
    outputs = core.step()
    assert {o.request_id for o in outputs} == {"a", "b"}
    assert all(isinstance(o.error, EngineError) and "secret" not in str(o.error) for o in outputs)
    assert core.scheduler.allocator.num_free == 64
    model(core).before_forward = lambda batch: None
    core.add(request("c", (5, 9), max_tokens=4))
    assert tokens(run(core)["c"]) == greedy((5, 9), 4)
    assert balanced(core)


def test_a_sequence_that_breaks_the_forward_pass_fails_alone() -> None:
    core = fake_core()
    prompts = {"a": (5, 9), "poison": (66, 66), "b": tuple(range(14))}
    for name, prompt in prompts.items():
        core.add(request(name, prompt, max_tokens=4, prompt_logprobs=0))

    def break_on_poison(batch: Batch) -> None:
        if (batch.token_ids_T == 66).any():
            raise EngineError("rows are not finite", reason="ROWS_NOT_FINITE")

    model(core).before_forward = break_on_poison
    outputs = run(core)
    assert [(o.error and o.error.reason, o.token_ids) for o in outputs["poison"]] == [("ROWS_NOT_FINITE", ())]
    for name in "ab":
        assert tokens(outputs[name]) == greedy(prompts[name], 4)
        assert len(outputs[name][0].prompt_logprobs or ()) == len(prompts[name])
    # Whatever the broken pass had sent to experts is forgotten, so that tables can be switched.
    assert isinstance(core.runner.dispatcher, FakeDispatcher)
    assert core.runner.dispatcher.begun == [1, 3]
    assert balanced(core)


def test_a_request_that_breaks_the_sampler_does_not_touch_its_neighbours() -> None:
    core = fake_core()
    core.add(request("good", (5, 9), max_tokens=4))
    core.add(request("bad", (5, 9), max_tokens=4, bad_token_ids=(VOCAB_SIZE + 5,)))
    outputs = run(core)
    assert isinstance(outputs["bad"][-1].error, EngineError)
    assert tokens(outputs["good"]) == greedy((5, 9), 4)
    assert balanced(core)


@pytest.mark.parametrize("options", [{}, {"max_logit_rows": 3}, {"num_blocks": 6, "max_logit_rows": 3}])
def test_prompt_logprobs_come_once_and_complete_however_the_prompt_was_cut(options: dict[str, Any]) -> None:
    core = fake_core(**options)
    core.add(request("old", tuple(range(10)), max_tokens=14))
    core.add(request("a", PROMPTS["b"][:12], max_tokens=6, prompt_logprobs=2, logprobs=0))
    outputs = run(core)["a"]
    assert [o.prompt_logprobs is not None for o in outputs] == [True] + [False] * 5
    entries = outputs[0].prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    prompt = PROMPTS["b"][:12]
    assert len(entries) == len(prompt)
    for position, entry in enumerate(entries[1:], start=1):
        best = next_token(prompt[:position])
        logprobs_V = ((torch.arange(VOCAB_SIZE) - best).remainder(VOCAB_SIZE) / -8).log_softmax(0)
        assert entry is not None
        assert entry.token.token_id == prompt[position]
        assert entry.token.logprob == pytest.approx(logprobs_V[prompt[position]].item())
        assert [top.token_id for top in entry.top] == [best, (best + 1) % VOCAB_SIZE]
    assert tokens(outputs) == greedy(prompt, 6)
    assert all(o.logprobs and o.logprobs[0].token.rank == 1 and o.logprobs[0].top == () for o in outputs)
    assert (core.scheduler.num_preemptions > 0) == ("num_blocks" in options)


def test_a_prompt_of_one_token_has_no_logprob() -> None:
    core = fake_core()
    core.add(request("a", (5,), max_tokens=1, prompt_logprobs=1))
    assert run(core)["a"][0].prompt_logprobs == (None,)


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 1000])
def test_scoring_gives_the_logits_of_every_position_beside_running_requests(chunk_size: int | None) -> None:
    core = fake_core(num_blocks=10)
    core.add(request("a", (5, 9), max_tokens=25))
    core.step()
    text = tuple(range(10, 31))
    job = scorer.make_job(core, "score", text, chunk_size)
    outputs = []
    while not job.done:
        scorer.advance(core, job)
        core.scheduler.check()
        outputs += core.step()
    core.scheduler.give_back("score")
    logits_TV = torch.cat(job.parts)
    assert logits_TV.argmax(1).tolist() == [next_token(text[: i + 1]) for i in range(len(text))]
    outputs += run(core).get("a", [])
    assert tokens(outputs) == greedy((5, 9), 25)[1:]
    assert core.scheduler.allocator.num_free == 10


@pytest.mark.parametrize(
    ("text", "chunk_size"), [((), None), ((1,) * 129, None), ((-1,), None), ((VOCAB_SIZE,), None), ((1,), 0)]
)
def test_scoring_refuses_what_it_cannot_score(text: tuple[int, ...], chunk_size: int | None) -> None:
    with pytest.raises(InvalidRequestError):
        scorer.make_job(fake_core(), "score", text, chunk_size)


def test_scoring_refuses_logits_larger_than_the_bound() -> None:
    core = fake_core(max_score_bytes=4 * VOCAB_SIZE * 5)
    scorer.make_job(core, "score", (1,) * 5, None)
    with pytest.raises(InvalidRequestError, match="max_score_bytes"):
        scorer.make_job(core, "score", (1,) * 6, None)


def test_the_age_of_the_queue_is_that_of_requests_never_admitted() -> None:
    now = [0.0]
    core = fake_core(num_blocks=6, clock=lambda: now[0])
    for name in ("old", "young"):
        core.add(request(name, tuple(range(9)), max_tokens=12))
    while not core.scheduler.num_preemptions:
        core.step()
    now[0] = 7.0
    assert len(core.scheduler.waiting) == 1
    assert snapshot(core).max_queue_age_s == 0.0
    core.add(request("new", (1, 2)))
    now[0] = 9.0
    assert snapshot(core).max_queue_age_s == 2.0


def test_non_finite_logits_fail_one_request() -> None:
    core = fake_core()
    for name in "ab":
        core.add(request(name, (5, 9), max_tokens=3))
    forward = model(core).forward

    def poisoned(*args: Any) -> torch.Tensor:
        logits_PV = forward(*args)
        logits_PV[0, 3] = math.nan
        return logits_PV

    core.runner.model.forward = poisoned  # type: ignore[method-assign, assignment]
    outputs = core.step()
    assert isinstance(outputs[0].error, EngineError)
    assert outputs[1].error is None
