"""Several steps in flight: every stage has a part in every turn, and each step takes its share."""

import pytest

from llama4_dist.engine.snapshot import snapshot
from llama4_dist.engine.step_times import StepTimes
from tests.engine.fake_model import greedy, run, tokens
from tests.engine.sequences import request
from tests.stages.steady import in_turns, prompts, start
from tests.stages.turns import staged_core


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
    start(core, wanted, max_tokens=20)
    outputs = run(core)
    assert all(tokens(outputs[name]) == greedy(prompt, 20) for name, prompt in wanted.items())
    assert len(stages.turns) == 20 * 5


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
