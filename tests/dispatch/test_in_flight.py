"""Which rows of which replies count, without any link."""

import numpy as np
import torch

from llama4_dist.dispatch.in_flight import InFlight, Piece
from llama4_dist.dispatch.row_buffers import RowBuffer
from llama4_dist.dispatch.row_passes import TorchRowPasses

WIDTH = 4


def in_flight(num_rows: int, *, num_slices: int = 1) -> InFlight:
    """Rows in the order they came, all of expert 0."""
    flight = InFlight(
        origin=(0, 0, 0),
        num_tokens=num_rows,
        experts_TK=torch.zeros(num_rows, 1, dtype=torch.int64),
        order_N=np.arange(num_rows),
        buffer=RowBuffer(num_rows, WIDTH, torch.float32, torch.device("cpu")),
        passes=TorchRowPasses(),
    )
    if num_slices > 1:
        flight.cut(np.full(1, num_slices))
    return flight


def piece(start: int, stop: int, *, slice_index: int = 0, attempt: int = 0) -> Piece:
    return Piece("host", slice_index, slice(start, stop), ((0, stop - start),), stop - start, attempt, 0.0, False)


def rows(count: int, value: float) -> torch.Tensor:
    return torch.full((count, WIDTH), value)


def test_the_first_reply_of_a_row_counts_and_later_ones_do_not() -> None:
    flight = in_flight(4)
    first, second = piece(0, 4), piece(1, 3)
    flight.pieces = {1: first}
    flight.ask_again(np.arange(1, 3), np.ones(2, dtype=np.int64))
    assert flight.accept(second, rows(2, 5.0)) == 2
    assert flight.missing == 2
    assert flight.accept(first, rows(4, 7.0)) == 2
    assert flight.missing == 0
    assert flight.accept(second, rows(2, 9.0)) == 0
    assert flight.result()[:, 0].tolist() == [7.0, 5.0, 5.0, 7.0]


def test_slices_of_an_earlier_attempt_do_not_add_up_with_a_later_one() -> None:
    flight = in_flight(2, num_slices=2)
    old = flight.attempt
    assert flight.accept(piece(0, 2, slice_index=0, attempt=old), rows(2, 100.0)) == 2
    flight.ask_again(np.arange(2), np.full(2, 3))
    assert flight.missing == 6
    assert flight.accept(piece(0, 2, slice_index=1, attempt=old), rows(2, 100.0)) == 0
    for index in (2, 0, 1):
        assert flight.accept(piece(0, 2, slice_index=index, attempt=flight.attempt), rows(2, 1.0 + index)) == 2
    assert flight.result()[:, 0].tolist() == [6.0, 6.0]


def test_what_nobody_answers_is_asked_again() -> None:
    flight = in_flight(4)
    asked = piece(0, 4)
    flight.pieces = {1: asked}
    assert flight.unclaimed(asked).tolist() == [0, 1, 2, 3]
    flight.ask_again(np.arange(2), np.ones(2, dtype=np.int64))
    flight.accept(piece(0, 2), rows(2, 1.0))
    assert flight.unclaimed(asked).tolist() == [2, 3]


def test_rows_that_another_frame_asks_for_are_claimed() -> None:
    flight = in_flight(4)
    slow, hedge = piece(0, 4), piece(2, 4)
    flight.pieces = {1: slow}
    flight.expect_twice()
    flight.pieces[2] = hedge
    assert flight.unclaimed(slow).tolist() == [0, 1]
    assert flight.accept(hedge, rows(2, 3.0)) == 2
    assert flight.accept(slow, rows(4, 3.0)) == 2
    assert flight.missing == 0
