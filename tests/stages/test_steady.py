"""Several steps in flight: every stage has a part in every turn, and tokens are the same whatever happens meanwhile."""

from collections.abc import Callable
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llama4_dist.engine import scorer
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.port import is_last
from llama4_dist.engine.snapshot import snapshot
from llama4_dist.engine.step_times import StepTimes
from llama4_dist.errors import DeadlineExceededError, EngineError, Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch
from llama4_dist.request import FinishReason, TokenOutput
from tests.engine.fake_model import EOS, fake_core, greedy, run, tokens
from tests.engine.sequences import request
from tests.stages.turns import Stages, staged_core

GONE = UnavailableError("expert 3 of layer 1 has no live host", reason="EXPERT_UNREACHABLE")


def in_turns(num_stages: int) -> Stages:
    stages = Stages(num_stages)
    stages.wait = stages.turn
    return stages


def prompts(number: int, length: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"r{i}": tuple((5 * i + j) % 90 for j in range(length)) for i in range(number)}


def raising(error: Exception, token: int) -> Callable[[Batch], None]:
    """Fail a part that holds a token."""

    def check(batch: Batch) -> None:
        if (batch.token_ids_T == token).any():
            raise error

    return check


def start(core: EngineCore, wanted: dict[str, tuple[int, ...]], **fields: Any) -> None:
    for name, prompt in wanted.items():
        core.add(request(name, prompt, **{"max_tokens": 12} | fields))


def all_free(core: EngineCore) -> bool:
    return core.scheduler.allocator.num_free == core.scheduler.allocator.num_pages


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("a_stage", [1, 2, 3])
def test_every_stage_computes_in_every_turn(num_stages: int, a_stage: int) -> None:
    """P turns a token, and P - 1 to fill and drain once: no stage waits for the leader between two steps."""
    stages, wanted = in_turns(num_stages), prompts(num_stages * a_stage)
    options = {"max_num_seqs": 12, "max_num_batched_tokens": 48, "num_blocks": 96, "enable_prefix_caching": False}
    core = staged_core(stages, **options)
    start(core, wanted, max_tokens=20)
    outputs = run(core)
    assert {name: tokens(outputs[name]) for name in wanted} == {name: greedy(p, 20) for name, p in wanted.items()}
    assert len(stages.turns) == 20 * num_stages + num_stages - 1
    full = stages.turns[num_stages - 1 : 1 - num_stages]
    assert full == [tuple(range(num_stages))] * len(full), "a stage had no part"
    steps = [[part.step for stage, part in stages.computed if stage == s] for s in range(num_stages)]
    assert all(computed == list(range(1, 20 * num_stages + 1)) for computed in steps), "steps out of order"


def test_a_step_at_a_time_fills_and_drains() -> None:
    """The same with one step in flight, which goes out in parts: the slow, obvious way."""
    stages, wanted = in_turns(3), prompts(6)
    core = staged_core(stages, max_num_batched_tokens=48)
    core.flight.depth = 1
    core.flight.submit = _whole(core)  # type: ignore[method-assign]
    start(core, wanted, max_tokens=20)
    outputs = run(core)
    assert all(tokens(outputs[name]) == greedy(prompt, 20) for name, prompt in wanted.items())
    assert len(stages.turns) == 20 * 5


def _whole(core: EngineCore) -> Any:
    """A step is computed when it is finished, in as many parts as there are stages."""
    core.runner._steady = None
    return core.flight.submit


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7])
def test_with_few_sequences_there_are_fewer_steps_and_never_more_than_stages(number: int) -> None:
    stages, wanted, most = in_turns(3), prompts(number), []
    core = staged_core(stages, max_num_batched_tokens=48)
    start(core, wanted)
    while core.has_work:
        core._begin_steps(0.0)
        most.append(snapshot(core).steps_in_flight)
        planned = [span.sequence.request_id for step in core.flight._steps for span in step.spans]
        assert len(planned) == len(set(planned)), "a sequence is in two steps"
        assert max(len(step.spans) for step in core.flight._steps) <= -(-number // 3)
        core.step()
    assert max(most) == min(3, number)


def test_steps_are_made_equal_again_when_some_have_ended() -> None:
    stages, wanted = in_turns(2), prompts(6)
    core = staged_core(stages, max_num_batched_tokens=48)
    for number, (name, prompt) in enumerate(wanted.items()):
        core.add(request(name, prompt, max_tokens=3 if number < 2 else 20))
    run(core)
    sizes = [len(part.spans) for stage, part in stages.computed if stage == 0]
    assert sizes[:4] == [3, 3, 3, 3]
    assert sizes[12:36] == [2] * 24


def test_a_prompt_alone_goes_out_in_parts_and_prompts_together_share_the_budget() -> None:
    alone, together = in_turns(4), in_turns(4)
    core = staged_core(alone, max_num_batched_tokens=16, enable_prefix_caching=False)
    start(core, prompts(1, 32), max_tokens=1)
    run(core)
    assert [len(part.token_ids_T) for stage, part in alone.computed if stage == 0] == [4] * 8
    assert len(alone.turns) == 2 * 7
    core = staged_core(together, max_num_batched_tokens=16, enable_prefix_caching=False)
    start(core, prompts(4, 16), max_tokens=1)
    run(core)
    sizes = [len(part.token_ids_T) for stage, part in together.computed if stage == 0]
    assert sizes == [4] * 16, "each has its share, in one part"
    assert len(together.turns) == 16 + 3


@pytest.mark.parametrize("num_decoding", [1, 2])
def test_prompts_beside_decodes_of_other_steps_are_bounded_as_in_one_step(
    monkeypatch: pytest.MonkeyPatch, num_decoding: int
) -> None:
    stages = in_turns(2)
    core = staged_core(stages, max_num_batched_tokens=48, enable_prefix_caching=False)
    start(core, prompts(num_decoding), max_tokens=30)
    core.step()
    monkeypatch.setattr(StepTimes, "prompt_tokens_beside_decodes", lambda times, slowdown, at_least: 6)
    start(core, {"long": tuple(range(24)), "other": tuple(range(30, 54))}, max_tokens=1)
    seen = []
    for _ in range(12):
        core._begin_steps(0.0)
        seen.append(core.flight.now().num_prompt_tokens)
        core.step()
    assert max(seen) == 6, "one bound for all that is in flight"


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
        stages.models[1].before_forward = _refuse if number % 5 == 3 else lambda batch: None
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert {name: tokens(outputs[name]) for name in wanted} == {name: greedy(p, 12) for name, p in wanted.items()}
    assert core.counters.holds > 1
    assert not core.has_work


def _refuse(batch: Batch) -> None:
    raise GONE


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


REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(0, 20), min_size=1, max_size=14).map(tuple),
            "at_step": st.integers(0, 12),
            "abort_after": st.one_of(st.none(), st.integers(1, 9)),
            "max_tokens": st.integers(1, 10),
            "temperature": st.sampled_from([0.0, 2.0]),
            "seed": st.integers(0, 3),
            "tenant": st.sampled_from("xy"),
            "priority": st.integers(0, 1),
        }
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    wanted=REQUESTS,
    num_stages=st.integers(2, 4),
    num_blocks=st.integers(8, 20),
    order=st.integers(0, 1 << 16),
    faults=st.sets(st.integers(0, 40), max_size=4),
)
def test_any_schedule_says_what_one_step_at_a_time_says(
    wanted: list[dict[str, Any]], num_stages: int, num_blocks: int, order: int, faults: set[int]
) -> None:
    """Stages compute in any order that their queues allow; now and then a step finds no expert."""
    options = {"num_blocks": num_blocks, "max_context": 28, "max_num_batched_tokens": 8}
    whole = _serve(fake_core(**options), wanted, lambda number: None)
    random = Random(order)
    stages = Stages(num_stages, pick=random.choice)
    core = staged_core(stages, **options)

    def before_step(number: int) -> None:
        model = stages.models[number % num_stages]
        model.before_forward = _refuse if number in faults else lambda batch: None

    staged = _serve(core, wanted, before_step)
    for name, outputs in staged.items():
        said, expected = tokens(outputs), tokens(whole[name])
        if FinishReason.CANCELLED in (outputs[-1].finish_reason, whole[name][-1].finish_reason):
            length = min(len(said), len(expected))
            assert said[:length] == expected[:length]
        else:
            assert said == expected
    assert all_free(core)


def _serve(
    core: EngineCore, wanted: list[dict[str, Any]], before_step: Callable[[int], None]
) -> dict[str, list[TokenOutput]]:
    """Submit and abort by the number of the step; return all outputs."""
    outputs: dict[str, list[TokenOutput]] = {f"r{number}": [] for number in range(len(wanted))}
    for step in range(2000):
        before_step(step)
        said: list[TokenOutput] = []
        for number, fields in enumerate(wanted):
            own = {k: v for k, v in fields.items() if k not in ("prompt", "at_step", "abort_after")}
            if step == fields["at_step"]:
                said += core.add(request(f"r{number}", fields["prompt"], **own))
            if fields["abort_after"] is not None and step == fields["at_step"] + fields["abort_after"]:
                said += core.abort(f"r{number}")
        if step > 25 and not core.has_work:
            return outputs
        said += core.step()
        for output in said:
            seen = outputs[output.request_id]
            assert not (seen and is_last(seen[-1])), "an output follows the last"
            seen.append(output)
    raise AssertionError("still busy")
