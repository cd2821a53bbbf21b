"""In how many parts a batch runs: the formula by hand, and a choice that noise does not flip."""

import pytest

from llama4_dist.dispatch.microbatches import ENOUGH, LayerTimes, MicrobatchChoice, layer_s, num_microbatches


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


def test_nothing_is_chosen_before_enough_is_known() -> None:
    choice = MicrobatchChoice()
    for index in range(ENOUGH):
        assert choice.choose(512) == 1
        choice.observe(512, times(390, 128, 309, 73, 132))
        choice.observe(256, times(209, 64, 308, 43, 74))
        assert choice.choose(512) == (1 if index < ENOUGH - 1 else 2)
    assert choice.choose(64) == 1


def test_without_times_of_half_the_size_those_of_the_whole_count() -> None:
    choice = MicrobatchChoice()
    for _ in range(ENOUGH):
        choice.observe(512, times(390, 128, 309, 73, 132))
        choice.observe(64, times(1, 1, 10, 200, 200))
    assert choice.choose(512) == 1, "1036 us in two parts at the whole's times, 904 in one"
    assert choice.choose(64) == 1, "411 us in one part, 412 in two"


def test_one_slow_layer_does_not_change_the_choice() -> None:
    choice = MicrobatchChoice()
    for _ in range(ENOUGH):
        choice.observe(512, times(390, 128, 309, 73, 132))
        choice.observe(256, times(209, 64, 308, 43, 74))
    choice.observe(256, times(20900, 64, 308, 43, 74))
    assert choice.choose(512) == 2


def test_a_batch_of_one_row_has_no_halves_and_times_are_checked() -> None:
    choice = MicrobatchChoice(margin=0.0)
    for _ in range(ENOUGH):
        choice.observe(1, times(1, 1, 1, 500, 500))
        choice.observe(0, times(0, 0, 0))
    assert choice.choose(1) == 1
    with pytest.raises(ValueError, match="negative"):
        times(-1, 0, 0)
    with pytest.raises(ValueError, match="part of the reply"):
        LayerTimes(attention_s=1, shared_s=1, expert_s=2, reply_s=1)
