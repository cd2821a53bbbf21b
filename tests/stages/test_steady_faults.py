"""Whatever ends, fails or is lost while several steps are in flight, tokens are those of one step at a time."""

from collections.abc import Callable
from typing import Any

import pytest

from llama4_dist.engine import scorer
from llama4_dist.errors import DeadlineExceededError, EngineError, Llama4Error, UnavailableError
from llama4_dist.request import FinishReason, TokenOutput
from tests.engine.fake_model import EOS, fake_core, greedy, run, tokens
from tests.engine.sequences import request
from tests.stages.steady import GONE, all_free, prompts, raising, refuse, start
from tests.stages.turns import Stages, staged_core


@pytest.mark.parametrize("pick", [max, min], ids=["as late as can be", "as early as can be"])
def test_pages_of_one_that_ends_in_flight_go_to_a_later_step_at_once(pick: Callable[..., int]) -> None:
    """Its step still writes to them, but every stage computes that first. What is said of it is dropped."""
    stages = Stages(2, pick=pick)
    core = staged_core(stages, num_blocks=8, max_context=32, enable_prefix_caching=False)
    start(core, {"stays": (1, 2), "goes": tuple(range(20, 32))})
    said = core.step()
    (step,) = core.flight._steps
    assert [span.sequence.request_id for span in step.spans] == ["goes"]
    pages = {page for span in step.spans for run in span.sequence.pages for page in run.ids}
    computed_before = len(stages.computed)
    (cancelled,) = core.abort("goes")
    assert cancelled.finish_reason is FinishReason.CANCELLED
    core.add(request("comes", tuple(range(40, 55)), max_tokens=8))
    core._begin_steps(0.0)
    (comes,) = [s for s in core.scheduler.running if s.request_id == "comes"]
    assert pages & {page for run in comes.pages for page in run.ids}, "the pages were not given on"
    assert len(stages.computed) == computed_before, "the step was over before its pages were given on"
    outputs = run(core)
    assert "goes" not in outputs
    assert tokens(outputs["comes"]) == greedy(tuple(range(40, 55)), 8)
    assert tokens([*said, *outputs["stays"]]) == greedy((1, 2), 12)
    assert all_free(core)


def test_a_deadline_that_passes_in_flight_ends_only_its_own_sequence() -> None:
    now_s, stages, wanted = [0.0], Stages(3), prompts(5)
    core = staged_core(stages, clock=lambda: now_s[0])
    start(core, wanted)
    core.add(request("late", (70, 71), max_tokens=12, timeout_s=2.0))
    said = core.step()
    assert "late" in {s.request_id for s in core.flight.now().sequences}
    now_s[0] = 2.0
    said += core.step()
    (ended,) = [output for output in said if output.request_id == "late"]
    assert isinstance(ended.error, DeadlineExceededError)
    outputs = run(core)
    assert "late" not in outputs
    for name, prompt in wanted.items():
        assert tokens([o for o in said if o.request_id == name] + outputs[name]) == greedy(prompt, 12)
    assert all_free(core)


def test_pages_that_run_out_preempt_nobody_who_is_in_flight() -> None:
    stages, wanted = Stages(3), prompts(6, 8)
    core = staged_core(stages, num_blocks=17, max_num_batched_tokens=48, enable_prefix_caching=False)
    start(core, wanted, max_tokens=20)
    preempt, seen = core.scheduler._preempt, []

    def checked(sequence: Any) -> None:
        assert sequence not in core.flight.now().sequences, "who is in flight lost its pages"
        seen.append((sequence.order, max(s.order for s in core.scheduler.running)))
        preempt(sequence)

    core.scheduler._preempt = checked  # type: ignore[method-assign]
    outputs = run(core)
    assert seen, "nobody was preempted"
    assert all(order == youngest for order, youngest in seen), "an older one gave way to a younger one"
    assert all(tokens(outputs[name]) == greedy(prompt, 20) for name, prompt in wanted.items())
    assert all_free(core)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_that_breaks_its_step_ends_alone(stage: int) -> None:
    """The step's others are computed again, alone; what other steps say meanwhile is kept."""
    stages, wanted = Stages(3), prompts(6)
    core = staged_core(stages, max_num_batched_tokens=48)
    core.add(request("poison", (70, EOS), max_tokens=12))
    start(core, wanted)
    stages.models[stage].before_forward = raising(EngineError("poison"), EOS)
    outputs = run(core)
    (ended,) = outputs["poison"]
    assert isinstance(ended.error, EngineError)
    assert all(tokens(outputs[name]) == greedy(prompt, 12) for name, prompt in wanted.items())
    assert core.counters.failed == 1
    assert all_free(core)


def test_one_that_ended_while_its_step_failed_is_not_computed_again() -> None:
    """Its pages are another's by then; and who is left of the step is not blamed for it."""
    stages = Stages(2)
    core = staged_core(stages, max_num_batched_tokens=48, enable_prefix_caching=False)
    stages.models[1].before_forward = raising(EngineError("poison"), EOS)
    start(core, {"a": (1, 2)})
    core._begin_steps(0.0)
    start(core, {"b": (3, 4), "bad": (5, EOS), "c": (6, 7)})
    said = core.step()
    (step,) = core.flight._steps
    assert [span.sequence.request_id for span in step.spans] == ["b", "bad"]
    core.abort("bad")
    outputs = run(core)
    for name, prompt in {"a": (1, 2), "b": (3, 4), "c": (6, 7)}.items():
        assert tokens([o for o in said if o.request_id == name] + outputs[name]) == greedy(prompt, 12)
    assert core.counters.failed == 0


def test_what_an_expert_is_missing_for_waits_and_other_steps_go_on() -> None:
    """Whoever is in a step with it waits with it, as all do where there is one step."""
    now_s, stages, wanted = [0.0], Stages(3), prompts(5)
    core = staged_core(stages, clock=lambda: now_s[0], expert_timeout_s=30.0)
    start(core, wanted)
    core.add(request("waits", (70, EOS), max_tokens=12))
    stages.models[2].before_forward = raising(GONE, EOS)
    outputs: list[TokenOutput] = []
    for _ in range(30):
        now_s[0] += 1.0
        outputs += core.step()
    said = {name: tokens([output for output in outputs if output.request_id == name]) for name in wanted}
    assert sum(said[name] == greedy(prompt, 12) for name, prompt in wanted.items()) == 4
    assert core.counters.holds == 1, "others' tokens were taken for an end of the hold"
    now_s[0] += 4.0
    outputs += core.step()
    ended = [output for output in outputs if output.error is not None]
    assert len(ended) == 2
    assert all(isinstance(output.error, UnavailableError) for output in ended)
    assert all_free(core)


def test_a_hold_that_ends_loses_no_token_and_says_none_twice() -> None:
    stages, wanted = Stages(3), prompts(6)
    core = staged_core(stages)
    start(core, wanted)
    outputs: dict[str, list[TokenOutput]] = {}
    for number in range(200):
        stages.models[1].before_forward = refuse if number % 5 == 3 else lambda batch: None
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert {name: tokens(outputs[name]) for name in wanted} == {name: greedy(p, 12) for name, p in wanted.items()}
    assert core.counters.holds > 1
    assert not core.has_work


@pytest.mark.parametrize("told", [False, True], ids=["found by a step", "told by a link"])
def test_a_group_that_is_lost_ends_what_runs_and_the_next_one_computes_the_rest(told: bool) -> None:
    first, second = Stages(3), Stages(3)
    model, wanted = first.model, prompts(5)
    core = fake_core(model=model, max_num_seqs=4)
    start(core, wanted)
    said = core.step() + core.step()
    first.lost = True
    ended = core.lose(_lost()) if told else core.step()
    assert core.flight.num_steps == 0
    assert {output.request_id for output in ended} == {"r0", "r1", "r2", "r3"}
    assert all(isinstance(output.error, UnavailableError) and output.error.reason == "WORKER_LOST" for output in ended)
    assert core.step() == []
    model.reset(second.members, second.outputs)
    assert core.renew() == []
    for name in ("r0", "r1", "r2", "r3"):  # as a replay on another engine, or on this one, would be
        before = tuple(tokens([output for output in said if output.request_id == name]))
        core.add(request(name, wanted[name], output_token_ids=before, max_tokens=12))
    outputs = run(core)
    for name, prompt in wanted.items():
        assert tokens([o for o in said if o.request_id == name] + outputs[name]) == greedy(prompt, 12)
    assert all_free(core)


def _lost() -> Llama4Error:
    return UnavailableError("a member died", reason="WORKER_LOST")


def test_a_score_between_steps_waits_for_those_in_flight_and_loses_nothing() -> None:
    stages, wanted, text = Stages(3), prompts(6), tuple(range(50, 73))
    core = staged_core(stages, num_blocks=24)
    start(core, wanted)
    outputs = core.step()
    job = scorer.make_job(core, "score/1", text, 5)
    while not job.done:
        scorer.advance(core, job)
        assert core.flight.num_steps == 0
        outputs += core.step()
    core.scheduler.give_back("score/1")
    best = [row_V.argmax().item() for part_TV in job.parts for row_V in part_TV]
    assert best == [greedy(text[: i + 1], 1)[0] for i in range(len(text))]
    rest = run(core)
    for name, prompt in wanted.items():
        assert tokens([o for o in outputs if o.request_id == name] + rest.get(name, [])) == greedy(prompt, 12)


def test_all_that_is_in_flight_ends_when_an_engine_closes() -> None:
    stages = Stages(3)
    core = staged_core(stages)
    start(core, prompts(6))
    core.step()
    assert len(core.fail_all(UnavailableError("closing", reason="DRAINING"))) == 6
    assert all_free(core)
    assert run(core) == {}, "a sequence that had ended said something"
