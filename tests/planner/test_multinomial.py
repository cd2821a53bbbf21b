"""Expectations over draws against sums that are exact for small numbers."""

import itertools
from math import factorial, prod

import pytest

from llama4_dist.planner.multinomial import (
    estimate_fullest,
    estimated_slowest,
    expected_distinct,
    slowest_host,
    spread,
    zipf,
)


def outcomes(num_rows: int, popularity: tuple[float, ...]) -> list[tuple[tuple[int, ...], float]]:
    """Return every way in which rows fall on experts, with its probability."""
    found = []
    for counts in itertools.product(range(num_rows + 1), repeat=len(popularity)):
        if sum(counts) == num_rows:
            ways = factorial(num_rows) / prod(factorial(count) for count in counts)
            found.append((counts, ways * prod(p**count for p, count in zip(popularity, counts, strict=True))))
    return found


@pytest.mark.parametrize("exponent", [0.0, 1.0])
@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_draws_agree_with_the_exact_sum(exponent: float, num_hosts: int) -> None:
    popularity = zipf(4, exponent)
    hosts = spread(popularity, 1, num_hosts).hosts_of
    exact_s = exact_rows = 0.0
    for counts, probability in outcomes(6, popularity):
        seconds, rows = [0.0] * num_hosts, [0] * num_hosts
        for expert, count in enumerate(counts):
            seconds[hosts[expert]] += max(1.0, 0.4 * count) if count else 0.0
            rows[hosts[expert]] += count
        exact_s += probability * max(seconds)
        exact_rows += probability * max(rows)
    found = slowest_host(6, popularity, spread(popularity, 1, num_hosts), read_s=1.0, row_s=0.4)
    assert found.seconds == pytest.approx(exact_s, rel=0.02)
    assert found.rows == pytest.approx(exact_rows, rel=0.02)


def test_distinct_experts_are_the_exact_sum() -> None:
    popularity = zipf(4, 1.0)
    exact = sum(probability * sum(count > 0 for count in counts) for counts, probability in outcomes(5, popularity))
    assert expected_distinct(5, popularity) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("experts", "slices", "hosts"), [(16, 2, 32), (16, 2, 16), (16, 16, 16), (128, 1, 8), (5, 3, 4)]
)
def test_slices_lie_evenly_and_those_of_an_expert_apart(experts: int, slices: int, hosts: int) -> None:
    placed = spread(zipf(experts, 0.0), slices, hosts).hosts_of
    held = [placed.count(host) for host in range(hosts)]
    assert max(held) - min(held) <= 1
    for expert in range(experts):
        of_one = placed[expert * slices : (expert + 1) * slices]
        assert len(set(of_one)) == min(slices, hosts)


def test_more_slices_shorten_the_slowest_host_in_proportion() -> None:
    whole = slowest_host(1, zipf(16, 0.0), spread(zipf(16, 0.0), 1, 16), read_s=1.0, row_s=0.0)
    cut = slowest_host(1, zipf(16, 0.0), spread(zipf(16, 0.0), 4, 64), read_s=0.25, row_s=0.0)
    assert (whole.seconds, cut.seconds) == (1.0, 0.25)


def test_popular_experts_make_the_slowest_host_slower() -> None:
    even = slowest_host(4096, zipf(16, 0.0), spread(zipf(16, 0.0), 1, 16), read_s=1e-6, row_s=1e-6)
    skewed = slowest_host(4096, zipf(16, 1.0), spread(zipf(16, 1.0), 1, 16), read_s=1e-6, row_s=1e-6)
    assert skewed.rows > 3 * even.rows
    assert skewed.seconds > 3 * even.seconds


@pytest.mark.parametrize("rows", [1, 16, 128, 1024, 4096])
@pytest.mark.parametrize(("experts", "slices", "hosts"), [(16, 1, 16), (16, 2, 8), (128, 1, 8), (128, 1, 64)])
def test_the_estimate_that_ranks_layouts_is_near_the_draws(rows: int, experts: int, slices: int, hosts: int) -> None:
    popularity = zipf(experts, 0.0)
    drawn = slowest_host(rows, popularity, spread(popularity, slices, hosts), read_s=1.0, row_s=0.01)
    estimate = estimated_slowest(estimate_fullest(rows, popularity, slices, hosts), read_s=1.0, row_s=0.01)
    assert estimate.seconds == pytest.approx(drawn.seconds, rel=0.25)
