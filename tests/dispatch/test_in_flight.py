"""Which rows of which replies count, without any link."""

import numpy as np
import torch

from llama4_dist.dispatch.in_flight import InFlight, Piece, sum_copies
from llama4_dist.dispatch.row_buffers import RowBuffer
from llama4_dist.dispatch.row_passes import TorchRowPasses

WIDTH = 4


def in_flight(num_rows: int) -> InFlight:
    """Rows in the order they came, all of expert 0."""
    return InFlight(
        origin=(0, 0, 0),
        num_tokens=num_rows,
        experts_TK=torch.zeros(num_rows, 1, dtype=torch.int64),
        order_N=np.arange(num_rows),
        buffer=RowBuffer(num_rows, WIDTH, torch.float32, torch.device("cpu")),
        passes=TorchRowPasses(),
    )


def piece(start: int, stop: int) -> Piece:
    return Piece("host", slice(start, stop), ((0, stop - start),), stop - start, 0.0, False)


def rows(count: int, value: float) -> torch.Tensor:
    return torch.full((count, WIDTH), value)


def test_the_first_reply_of_a_row_counts_and_later_ones_do_not() -> None:
    flight = in_flight(4)
    first, second = piece(0, 4), piece(1, 3)
    flight.pieces = {1: first}
    flight.ask_again(np.arange(1, 3))
    assert flight.accept(second, rows(2, 5.0)) == 2
    assert flight.missing == 2
    assert flight.accept(first, rows(4, 7.0)) == 2
    assert flight.missing == 0
    assert flight.accept(second, rows(2, 9.0)) == 0
    assert flight.result()[:, 0].tolist() == [7.0, 5.0, 5.0, 7.0]


def test_copies_of_a_token_are_added_one_after_the_other_and_rounded_once() -> None:
    """Hand-made: in bfloat16 256 + 1 is 256, so three copies of 1 would be lost one by one."""
    y_TKD = torch.tensor([256.0, 1.0, 1.0, 1.0]).view(1, 4, 1).to(torch.bfloat16)
    assert sum_copies(y_TKD).tolist() == [[260.0]]  # 259, to the nearest of bfloat16
    assert sum_copies(torch.tensor([1e8, 1.0, -1e8]).view(1, 3, 1)).tolist() == [[0.0]]  # in their order


def test_what_nobody_answers_is_asked_again() -> None:
    flight = in_flight(4)
    asked = piece(0, 4)
    flight.pieces = {1: asked}
    assert flight.unclaimed(asked).tolist() == [0, 1, 2, 3]
    flight.ask_again(np.arange(2))
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
