"""What is compared between hosts: every layer and every host in its turn, and only what a host itself has said."""

from collections import Counter

import numpy as np
import pytest

from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.in_flight import Piece
from tests.dispatch.test_in_flight import in_flight, piece, rows


@pytest.mark.parametrize("num_layers", [4, 24, 48])
@pytest.mark.parametrize("every", [1, 8, 256])
def test_every_layer_is_checked_equally_often_whatever_the_period(num_layers: int, every: int) -> None:
    checks = CrossCheck(every=every)
    due = Counter(number % num_layers for number in range(every * num_layers * 64) if checks.due())
    assert due.total() == num_layers * 64
    assert len(due) == num_layers
    assert max(due.values()) < 2 * 64


def test_a_period_of_zero_checks_nothing() -> None:
    checks = CrossCheck(every=0)
    assert not any(checks.due() for _ in range(1000))


def test_every_host_of_a_dispatch_is_sampled_and_not_only_the_last_to_answer() -> None:
    flight = in_flight(6)
    pieces = [from_host(name, start) for name, start in (("a", 0), ("b", 2), ("c", 4))]
    flight.pieces = dict(enumerate(pieces))
    for one in pieces:
        assert flight.accept(one, rows(2, 1.0)) == 2
    checks = CrossCheck(every=1)
    sampled = {sample.host for _ in range(50) if (sample := checks.sample(flight)) is not None}
    assert sampled == {"a", "b", "c"}


def test_rows_that_another_host_answered_first_are_not_held_against_the_slow_one() -> None:
    flight = in_flight(4)
    slow, hedge = piece(0, 4), piece(0, 2)._replace(host="replica")
    flight.pieces = {1: slow}
    flight.expect_twice()
    flight.pieces[2] = hedge
    flight.accept(hedge, rows(2, 5.0))
    flight.accept(slow, rows(4, 7.0))
    checks = CrossCheck(every=1)
    samples = [checks.sample(flight) for _ in range(20)]
    assert {sample.host for sample in samples if sample is not None} == {"replica"}


def from_host(host: str, start: int) -> Piece:
    return piece(start, start + 2)._replace(host=host, positions=slice(start, start + 2))


def test_nothing_is_sampled_where_nobody_answered() -> None:
    flight = in_flight(2)
    flight.pieces = {1: piece(0, 2)}
    assert CrossCheck(every=1).sample(flight) is None
    flight.ask_again(np.arange(2))
    assert CrossCheck(every=1).sample(flight) is None
