"""Where experts are cut: everything once, evenly, on borders that quantisation and native passes can use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.checkpoint.expert_slices import slice_bounds


@given(st.integers(1, 20_000).flatmap(lambda width: st.tuples(st.just(width), st.integers(1, min(width, 64)))))
def test_slices_cover_the_width_once_and_none_is_empty(case: tuple[int, int]) -> None:
    width, num_slices = case
    bounds = slice_bounds(width, num_slices)
    assert [column for columns in bounds for column in columns] == list(range(width))
    assert len(bounds) == num_slices
    assert all(bounds)
    if width >= 128 * num_slices:
        assert all(columns.start % 128 == 0 for columns in bounds)
        assert max(map(len, bounds)) - min(map(len, bounds)) <= 128 + (-width % 128)


def test_the_familys_widths_are_cut_at_multiples_of_128() -> None:
    assert slice_bounds(8192, 1) == (range(8192),)
    assert slice_bounds(8192, 4) == (range(2048), range(2048, 4096), range(4096, 6144), range(6144, 8192))
    assert list(map(len, slice_bounds(8192, 3))) == [2816, 2688, 2688]


def test_narrow_experts_are_cut_in_grains_of_16_and_then_of_1() -> None:
    assert list(map(len, slice_bounds(96, 2))) == [48, 48]
    assert list(map(len, slice_bounds(96, 4))) == [32, 32, 16, 16]
    assert list(map(len, slice_bounds(12, 3))) == [4, 4, 4]


@pytest.mark.parametrize("num_slices", [0, -1, 97])
def test_a_cut_that_does_not_fit_is_refused(num_slices: int) -> None:
    with pytest.raises(ValueError, match=rf"expert_slices={num_slices} does not fit experts 96 wide: give 1"):
        slice_bounds(96, num_slices)
