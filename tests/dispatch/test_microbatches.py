"""In how many parts a batch runs: the formula by hand, and a choice that noise does not flip."""

import pytest

from llama4_dist.dispatch.microbatches import (
    ENOUGH,
    TRY_AGAIN,
    LayerTimes,
    MicrobatchChoice,
    could_save,
    layer_s,
    num_microbatches,
)


def times(attention: float, shared: float, expert: float, out: float = 0.0, back: float = 0.0) -> LayerTimes:
    """Microseconds; `out` and `back` are the two ways."""
    reply = out + expert + back
    return LayerTimes(attention_s=attention, shared_s=shared, expert_s=expert, reply_s=reply)


@pytest.mark.parametrize(
    ("part", "number", "expected"),
    [
        # Computed for H200s: a memory-bound expert of 308 us, batches that fill four attention groups.
        (times(390, 128, 309, 73, 132), 1, 904),
        (times(209, 64, 308, 43, 74), 2, 698),
        (times(149, 43, 308, 33, 55), 3, 924),
        (times(209, 64, 155, 41, 71), 2, 546),
        (times(157, 154, 77, 17, 23), 1, 311),  # hidden behind the shared expert alone
    ],
)
def test_a_layer_takes_what_the_formula_says(part: LayerTimes, number: int, expected: float) -> None:
    assert layer_s(part, number) == expected


def test_two_parts_where_they_save_and_one_where_weights_are_only_read_again() -> None:
    assert num_microbatches(times(390, 128, 309, 73, 132), times(209, 64, 308, 43, 74), current=1) == 2
    assert num_microbatches(times(576, 33, 1048, 12, 14), times(296, 33, 968, 11, 12), current=1) == 1
    assert num_microbatches(times(29, 39, 308, 10, 11), times(29, 39, 308, 10, 11), current=1) == 1


def test_a_saving_within_the_margin_changes_nothing() -> None:
    whole, half = times(100, 0, 100), times(49, 0, 49, 49)  # 200 in one part, 147 in two
    assert num_microbatches(whole, half, current=1, margin=0.3) == 1
    assert num_microbatches(whole, half, current=1, margin=0.2) == 2
    slower = times(105, 0, 105)  # 200 in one part, 210 in two
    assert num_microbatches(whole, slower, current=2, margin=0.1) == 2
    assert num_microbatches(whole, slower, current=2, margin=0.01) == 1


WAITS = times(100, 0, 300)  # attention has nothing to do for half of a step
HIDES = times(300, 100, 90)  # nobody waits for the experts


def steps(choice: MicrobatchChoice, number: int, seconds: dict[int, float], whole: LayerTimes = WAITS) -> list[int]:
    """Run steps of 512 rows that take so long in one part and in two; return in how many each was run."""
    chosen = []
    for _ in range(number):
        chosen.append(choice.choose(512))
        choice.observe(512, chosen[-1], seconds[chosen[-1]], whole)
    return chosen


def test_two_parts_are_tried_and_kept_where_they_take_less() -> None:
    choice = MicrobatchChoice()
    assert steps(choice, 2 * ENOUGH, {1: 4.0, 2: 3.0}) == [1] * ENOUGH + [2] * ENOUGH
    assert set(steps(choice, 100, {1: 4.0, 2: 3.0})) == {2}
    assert choice.choose(64) == 1, "nothing is known of that size"


def test_two_parts_are_left_where_they_take_more_or_about_as_long() -> None:
    for two in (5.0, 3.9):
        choice = MicrobatchChoice()
        steps(choice, 2 * ENOUGH, {1: 4.0, 2: two})
        assert set(steps(choice, 100, {1: 4.0, 2: two})) == {1}


def test_two_parts_are_not_tried_where_nobody_waits() -> None:
    assert not could_save(HIDES)
    assert set(steps(MicrobatchChoice(), 100, {1: 4.0, 2: 1.0}, HIDES)) == {1}


def test_the_other_choice_is_tried_again_after_a_while() -> None:
    choice = MicrobatchChoice()
    assert steps(choice, TRY_AGAIN, {1: 4.0, 2: 5.0}).count(2) == ENOUGH
    assert steps(choice, TRY_AGAIN, {1: 4.0, 2: 3.0}).count(2) > TRY_AGAIN // 2, "hosts have become faster"
    assert steps(choice, 2 * TRY_AGAIN, {1: 2.0, 2: 3.0})[-1] == 1, "and slower"


def test_one_row_is_one_part() -> None:
    choice = MicrobatchChoice()
    for _ in range(2 * ENOUGH):
        choice.observe(1, 1, 4.0, WAITS)
    assert choice.choose(1) == 1
