"""What a seed draws."""

import pytest

from llama4_dist.chaos.schedule import Action, ChaosPlan, steps


def plan(**changes: object) -> ChaosPlan:
    return ChaosPlan(**({"duration_s": 300.0, "stop_every_s": 30.0} | changes))  # type: ignore[arg-type]


def test_a_seed_draws_the_same_run_again_and_another_seed_another_one() -> None:
    assert steps(plan(seed=7)) == steps(plan(seed=7))
    assert steps(plan(seed=7)) != steps(plan(seed=8))


def test_blows_come_about_as_often_as_asked_and_not_before_the_quiet_is_over() -> None:
    drawn = steps(plan(quiet_s=20.0))
    kills = [step for step in drawn if step.action is Action.KILL_EXPERT]
    assert 280 / 5 * 0.75 <= len(kills) <= 280 / 5 * 1.35
    assert min(step.at_s for step in drawn) > 20.0
    assert [step.at_s for step in drawn] == sorted(step.at_s for step in drawn)
    assert all(0.0 <= step.draw < 1.0 for step in drawn)


def test_scaling_goes_through_its_sizes_in_turn() -> None:
    sizes = [step.amount for step in steps(plan(hosts=(6, 3, 4))) if step.action is Action.SCALE]
    assert sizes[:6] == [6.0, 3.0, 4.0, 6.0, 3.0, 4.0]


def test_what_is_never_to_happen_does_not() -> None:
    assert {step.action for step in steps(plan(kill_every_s=None, scale_every_s=None))} == {Action.STOP_EXPERT}


@pytest.mark.parametrize(
    "wrong", [{"duration_s": 4.0}, {"kill_every_s": 0.0}, {"stop_every_s": -1.0}, {"hosts": ()}, {"hosts": (3, 0)}]
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|give sizes"):
        plan(**wrong)
