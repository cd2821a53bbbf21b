"""What is learned from steps, and which requests are refused because of it."""

from typing import Any

import pytest

from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.step_times import StepTimes
from llama4_dist.errors import OverloadedError
from llama4_dist.model.batch import Batch
from llama4_dist.request import TokenOutput
from tests.engine.fake_model import FakeModel, fake_core, greedy, run, tokens
from tests.engine.sequences import request

DECODE_S, PROMPT_TOKEN_S = 0.010, 0.001


def timed_core(**options: Any) -> EngineCore:
    """A core whose step takes 10 ms, and 1 ms more per prompt token."""
    now = [0.0]
    core = fake_core(clock=lambda: now[0], **options)
    assert isinstance(core.runner.model, FakeModel)

    def work(batch: Batch) -> None:
        num_decodes = sum(span.num_tokens == 1 for span in batch.spans)
        num_prompt_tokens = len(batch.token_ids_T) - num_decodes
        now[0] += (DECODE_S if num_decodes else 0.0) + PROMPT_TOKEN_S * num_prompt_tokens

    core.runner.model.before_forward = work
    return core


def test_decodes_and_prompt_tokens_are_told_apart() -> None:
    times = StepTimes()
    assert times.prompt_tokens_beside_decodes(2.0, at_least=4) is None
    times.note(num_decodes=0, num_prompt_tokens=100, seconds=0.1)
    times.note(num_decodes=8, num_prompt_tokens=0, seconds=0.02)
    assert times.prompt_tokens_beside_decodes(2.0, at_least=4) == 20
    assert times.prompt_tokens_beside_decodes(1.0, at_least=4) == 4
    for _ in range(200):
        times.note(num_decodes=8, num_prompt_tokens=10, seconds=0.04)
        times.note(num_decodes=8, num_prompt_tokens=0, seconds=0.02)
    assert times.prompt_tokens_beside_decodes(2.0, at_least=4) == pytest.approx(10, abs=1)
    assert times.seconds_for(num_prompt_tokens=10, num_decodes=3) == pytest.approx(0.01 + 0.06, rel=0.01)


def test_what_steps_take_at_least_is_not_learned_from_slow_ones() -> None:
    times = StepTimes()
    times.note(num_decodes=0, num_prompt_tokens=64, seconds=30.0)  # a compiler ran
    times.note(num_decodes=1, num_prompt_tokens=0, seconds=3.0)
    assert times.seconds_for(num_prompt_tokens=1000, num_decodes=100) == 0.0, "two steps say nothing"
    for _ in range(3):
        times.note(num_decodes=0, num_prompt_tokens=3, seconds=0.05)
        times.note(num_decodes=0, num_prompt_tokens=64, seconds=0.1)
        times.note(num_decodes=1, num_prompt_tokens=0, seconds=0.04)
        times.note(num_decodes=1, num_prompt_tokens=0, seconds=0.4)
    assert times.seconds_for(num_prompt_tokens=640, num_decodes=0) == pytest.approx(1.0)
    assert times.seconds_for(num_prompt_tokens=0, num_decodes=1) < 0.08


def test_a_machine_that_becomes_faster_or_slower_is_followed() -> None:
    """Decoding was measured at 100 ms and takes 10 now; 1 ms a prompt token: ten are right, not 100. And back."""
    times = StepTimes()
    times.note(num_decodes=8, num_prompt_tokens=0, seconds=0.1)
    times.note(num_decodes=0, num_prompt_tokens=100, seconds=0.1)
    for decode_s in (0.010, 0.100):
        allowed = []
        for _ in range(200):
            num_prompt_tokens = times.prompt_tokens_beside_decodes(2.0, at_least=1)
            assert num_prompt_tokens is not None
            allowed.append(num_prompt_tokens)
            times.note(num_decodes=8, num_prompt_tokens=num_prompt_tokens, seconds=decode_s + 0.001 * num_prompt_tokens)
        assert max(allowed) <= 2 * 100, "a guess from long ago let too much in"
        assert allowed.count(0) in (11, 12), "every 17th step decodes alone"
        assert 0.7 * decode_s <= 0.001 * max(allowed[-17:]) <= 1.5 * decode_s


@pytest.mark.parametrize(("slowdown", "largest_s"), [(2.0, 2 * DECODE_S), (float("inf"), DECODE_S + 0.063)])
def test_a_long_prompt_does_not_stall_those_who_read(slowdown: float, largest_s: float) -> None:
    core = timed_core(max_num_batched_tokens=64, num_blocks=400, max_context=1000, max_decode_slowdown=slowdown)
    core.add(request("reader", (1, 2, 3), max_tokens=120))
    for _ in range(10):
        core.step()
    core.add(request("long", tuple(range(90)) * 6, max_tokens=2))
    gaps: list[float] = []
    outputs: list[TokenOutput] = []
    before_s = core.clock()
    while core.has_work:
        outputs += core.step()
        gaps.append(core.clock() - before_s)
        before_s = core.clock()
    assert max(gaps) == pytest.approx(largest_s, rel=0.11)
    assert tokens([o for o in outputs if o.request_id == "long"]) == greedy(tuple(range(90)) * 6, 2)


def refusal(core: EngineCore, name: str, prompt: tuple[int, ...], **fields: Any) -> OverloadedError | None:
    outputs = core.add(request(name, prompt, **fields))
    if not outputs:
        return None
    assert isinstance(outputs[0].error, OverloadedError)
    assert core.scheduler.get(name) is None, "a refused request leaves nothing behind"
    return outputs[0].error


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    core = timed_core(max_num_batched_tokens=64, num_blocks=400, max_context=1000)
    prompt = tuple(range(90)) * 5
    assert refusal(core, "unmeasured", prompt, timeout_s=0.001, max_tokens=1) is None
    core.abort("unmeasured")
    core.add(request("teacher", tuple(range(1, 65)), max_tokens=9))
    run(core)
    # 450 prompt tokens take 0.45 s, and are refused with less than half of it.
    error = refusal(core, "hurried", prompt, timeout_s=0.2, max_tokens=1)
    assert error is not None
    assert (error.reason, error.retry_after_s) == ("DEADLINE_UNREACHABLE", 0.1)
    assert "raise timeout" in str(error)
    assert refusal(core, "possible", prompt, timeout_s=0.25, max_tokens=1, tenant="x") is None
    # Others of its tenant are ahead of this one; another tenant's turn may come before theirs.
    behind = refusal(core, "behind", (1, 2, 3, 4, 5, 6), timeout_s=0.2, max_tokens=1, tenant="x")
    assert behind is not None
    assert behind.retry_after_s == pytest.approx(0.45)
    assert refusal(core, "beside", (1, 2, 3, 4, 5, 6), timeout_s=0.2, max_tokens=1, tenant="y") is None
    # A step of 10 ms for each token that must be generated.
    assert refusal(core, "wordy", (1,), timeout_s=0.2, max_tokens=60, ignore_eos=True) is not None
    assert refusal(core, "brief", (1,), timeout_s=0.2, max_tokens=60) is None
    replay = {"output_token_ids": tuple(greedy(prompt, 3)), "max_tokens": 9}
    assert refusal(core, "begun elsewhere", prompt, timeout_s=0.001, **replay) is None
    run(core)
    stats = core.counters
    assert stats.admitted == stats.finished + stats.failed + stats.cancelled


def test_what_is_cached_takes_no_time() -> None:
    core = timed_core(max_num_batched_tokens=64, num_blocks=400, max_context=1000)
    prompt = tuple(range(90)) * 5
    core.add(request("first", prompt, max_tokens=3))
    run(core)
    assert refusal(core, "again", prompt, timeout_s=0.05, max_tokens=1) is None
    assert refusal(core, "other", prompt[1:], timeout_s=0.05, max_tokens=1) is not None
