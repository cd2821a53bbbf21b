"""What stages make of a step: against the formula of a whole model at a part of the batch."""

from dataclasses import replace

import pytest

from llama4_dist.planner.layout import Layout
from llama4_dist.planner.roofline import Work, expert_load
from llama4_dist.planner.step import StepTimes, step_of
from tests.planner.cases import request, step


def test_stages_compute_steps_side_by_side() -> None:
    """Two stages with half of the batch each: a token takes two turns of half of the layers, the last with the head."""
    staged = step("behemoth", Layout(stages=2, ranks=8, hosts=16, gpus_per_host=8, sequences=64))
    part = step("behemoth", Layout(ranks=8, hosts=16, gpus_per_host=8, sequences=32))
    assert staged.layer_s == pytest.approx(part.layer_s)
    assert staged.step_s == pytest.approx(2 * (48 * part.layer_s + part.head_s), rel=1e-6)
    assert staged.pipeline_s == pytest.approx(part.head_s, rel=1e-6)


def test_rows_between_stages_take_their_time() -> None:
    """Where that is longer than the head takes, it is on the way of every token."""
    layout = Layout(stages=2, ranks=8, hosts=16, gpus_per_host=8, sequences=64)
    staged = step("behemoth", layout, alpha_s=1e-3)
    hop_s = 1e-3 + 32 * 16384 * 2 / 8 / 40e9
    assert staged.step_s == pytest.approx(96 * staged.layer_s + staged.head_s + hop_s, rel=1e-6)
    assert staged.pipeline_s == pytest.approx(hop_s, rel=1e-6)


def test_the_last_stage_has_the_head_of_every_part() -> None:
    """With few layers a stage its head is what all wait for: four turns of the last stage, not of the others."""
    layout = Layout(stages=24, ranks=8, hosts=16, gpus_per_host=8, sequences=24)
    staged = step("scout", layout)
    part = step("scout", replace(layout, stages=1, sequences=1))
    assert staged.step_s == pytest.approx(24 * (2 * part.layer_s + staged.head_s), rel=1e-6)


def test_experts_read_their_weights_for_every_part() -> None:
    """Parts are in different layers, so no host serves two of them at once: one GPU an expert is the limit."""
    staged = step("behemoth", Layout(stages=4, ranks=8, hosts=16, sequences=128))
    assert staged.step_s == pytest.approx(4 * 96 * staged.terms.expert_mean_s, rel=1e-6)
    assert staged.step_s > 2 * 96 * staged.layer_s
    assert staged.expert_busy == 1.0


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_with_fewer_sequences_than_stages_a_token_still_passes_all_of_them(sequences: int) -> None:
    layout = Layout(stages=4, ranks=8, hosts=16, gpus_per_host=8, sequences=sequences)
    one = step("behemoth", replace(layout, stages=1, sequences=1))
    staged = step("behemoth", layout)
    assert staged.step_s == pytest.approx(one.step_s + 3 * 10e-6, rel=1e-3)
    idle_s = (4 - sequences) / 4 * 96 * staged.layer_s
    assert staged.pipeline_s == pytest.approx(idle_s + 3 * 10e-6, rel=1e-2)


def test_a_prompt_alone_fills_and_drains_the_stages() -> None:
    """Its parts wait for each other: P - 1 turns more than those of many prompts."""
    asked = request()
    layout = Layout(stages=2, ranks=8, hosts=16, gpus_per_host=8)
    many = Work(rows=1024, sequences=8, keys_read=0.0, keys_scored=0.0, logit_rows=0)

    def times(work: Work) -> StepTimes:
        found = asked.geometry, layout, asked.rates(layout)
        return step_of(*found, work, lambda rows: expert_load(*found, rows, asked.traffic))

    alone, beside = times(replace(many, sequences=1)), times(many)
    assert alone.layer_s == beside.layer_s
    hop_s = 10e-6 + 512 * 16384 * 2 / 8 / 40e9
    assert alone.step_s == pytest.approx(3 * 48 * alone.layer_s + alone.head_s + hop_s, rel=1e-6)
    assert beside.step_s == pytest.approx(2 * 48 * alone.layer_s + alone.head_s + max(alone.head_s, hop_s), rel=1e-6)
