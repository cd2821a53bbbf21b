"""Any schedule of requests, aborts and faults, computed in any order: the same tokens as one step at a time."""

from collections.abc import Callable
from random import Random
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.port import is_last
from llama4_dist.request import FinishReason, TokenOutput
from tests.engine.fake_model import fake_core, tokens
from tests.engine.sequences import request
from tests.stages.steady import all_free, refuse
from tests.stages.turns import Stages, staged_core

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
    options: dict[str, Any] = {"num_blocks": num_blocks, "max_context": 28, "max_num_batched_tokens": 8}
    whole = _serve(fake_core(**options), wanted, lambda number: None)
    random = Random(order)
    stages = Stages(num_stages, pick=random.choice)
    core = staged_core(stages, **options)

    def before_step(number: int) -> None:
        model = stages.models[number % num_stages]
        model.before_forward = refuse if number in faults else lambda batch: None

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
