"""The fit of growth on points whose growth is known."""

import pytest

from benchmarks.exponents import fit

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_is_found_exactly(exponent: float) -> None:
    found = fit(SIZES, [0.003 * size**exponent for size in SIZES])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_a_constant_part_does_not_hide_a_square() -> None:
    found = fit(SIZES, [100 + size**2 for size in SIZES])
    assert found.is_super_linear
    assert found.exponent == pytest.approx(1.9, abs=0.1)


def test_linear_growth_with_noise_is_not_called_more() -> None:
    noise = [1.0, 0.9, 1.1, 1.0, 1.08, 0.93, 1.05, 0.96, 1.1]
    found = fit(SIZES, [size * factor for size, factor in zip(SIZES, noise, strict=True)])
    assert not found.is_super_linear
    assert found.error > 0


def test_growth_slightly_above_linear_counts_only_beyond_its_error() -> None:
    assert fit(SIZES, [size**1.3 for size in SIZES]).is_super_linear
    uneven = [size**1.3 * (3.0 if index % 2 else 1.0) for index, size in enumerate(SIZES)]
    assert not fit(SIZES, uneven).is_super_linear


def test_of_few_points_the_largest_three_count() -> None:
    assert fit([1, 10, 100, 1000], [5.0, 1.0, 10.0, 100.0]).exponent == pytest.approx(1.0)


def test_points_may_come_in_any_order() -> None:
    assert fit([4, 1, 2], [16.0, 1.0, 4.0]).exponent == pytest.approx(2.0)


@pytest.mark.parametrize("times", [[1.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
def test_too_few_points_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be fitted"):
        fit([10**power for power in range(len(times))], times)
