"""What one dispatch still waits for: the rows it sent, who owes them, and the replies so far. Knows no links."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.dispatch.layout import Groups, Indices, Share
from llama4_dist.dispatch.row_buffers import RowBuffer
from llama4_dist.dispatch.row_passes import RowPasses, all_finite
from llama4_dist.errors import Llama4Error


class Piece(NamedTuple):
    """One posted frame: the positions it asks for, since when, whether a replica was asked too.

    A named tuple because one is made per frame.
    """

    host: str
    positions: slice | Indices
    groups: Groups
    num_rows: int
    sent_at: float
    hedged: bool
    adopts: bool = False  # the host was told to map what it does not hold


Origin = tuple[int, int, int]  # step, microbatch, layer: with the row number, this identifies a row within a worker


class InFlight:
    """One layer's rows between `dispatch` and `combine`. A position is a place in the laid-out order.

    The rows are kept until every reply is accepted, so any of them can be sent again elsewhere. Where experts are cut
    a copy is one slice of one. `error` is why it cannot finish.
    """

    __slots__ = (
        *(
            "origin",
            "num_tokens",
            "order_N",
            "rows_ND",
            "row_bytes",
            "buffer",
            "pieces",
            "refused",
            "answered",
            "error",
        ),
        *("missing", "deferred", "layer", "_experts_TK", "_passes", "_output_ND", "_answered_N"),
    )

    def __init__(
        self,
        *,
        origin: Origin,
        num_tokens: int,
        experts_TK: Tensor,
        order_N: Indices,
        buffer: RowBuffer,
        passes: RowPasses,
    ) -> None:
        num_copies = len(order_N)
        self.origin = origin
        self.layer = origin[2]
        self.num_tokens = num_tokens
        self.order_N = order_N
        self.rows_ND = buffer.rows(num_copies)
        self.row_bytes = buffer.row_bytes
        self.buffer = buffer  # the preallocated memory `rows_ND` lies in
        self.pieces: dict[int, Piece] = {}  # frame number to what it asks for; answered frames are taken out
        self.refused: set[tuple[str, int]] = set()  # (host, expert) that refused these rows
        self.answered: list[Piece] = []  # frames all of whose rows were taken from their own host's reply
        self.error: Llama4Error | None = None
        self.missing = num_copies  # positions without an accepted reply
        self.deferred: Share | None = None  # what a host of this thread is asked for when the rows are wanted
        self._experts_TK = experts_TK
        self._passes = passes
        self._output_ND: Tensor | None = None  # replies in the caller's order
        self._answered_N: NDArray[np.bool_] | None = None  # by position; kept once a row may be answered twice

    def owing(self) -> set[str]:
        """Return the hosts that owe a reply."""
        return {piece.host for piece in self.pieces.values()}

    def take_all(self, rows_ND: Tensor) -> bool:
        """Keep an answer to all rows at once; return whether every value is finite, else nothing counts as answered."""
        if not self._passes.put_if_finite(rows_ND, self.order_N, slice(0, self.missing), self._output()):
            return False
        self.missing = 0
        return True

    def accept(self, piece: Piece, rows_RD: Tensor) -> int | None:
        """Keep those rows of a reply that nobody answered before; return how many that were.

        None, and nothing counts as answered, where a value of the reply is not finite.
        """
        positions = piece.positions
        output_ND = self._output()
        if self._answered_N is None and isinstance(positions, slice):
            if not self._passes.put_if_finite(rows_RD, self.order_N, positions, output_ND):
                return None
            self.missing -= piece.num_rows
            self.answered.append(piece)
            return piece.num_rows
        if not all_finite(rows_RD):
            return None
        answered_N = self._account()
        wanted_R = self._wanted(piece)
        wanted = _as_indices(positions)[wanted_R]
        order_R = self.order_N[wanted]
        self._passes.put_if_finite(rows_RD[torch.from_numpy(wanted_R)], order_R, slice(0, len(wanted)), output_ND)
        answered_N[wanted] = True
        self.missing -= len(wanted)
        if len(wanted) == piece.num_rows:
            self.answered.append(piece)
        return len(wanted)

    def unclaimed(self, piece: Piece) -> Indices:
        """Return the positions of a piece that neither a reply nor another frame on its way covers."""
        positions = _as_indices(piece.positions)
        if self._answered_N is None:
            return positions
        wanted_R = self._wanted(piece)
        for other in self.pieces.values():
            if other is not piece:
                wanted_R &= ~np.isin(positions, _as_indices(other.positions))
        unclaimed: Indices = positions[wanted_R]
        return unclaimed

    def expect_twice(self) -> None:
        """Prepare for two frames that ask for the same rows."""
        self._account()

    def outputs_of(self, positions: Indices) -> Tensor:
        """Return copies of the accepted rows at these positions; call when nothing is missing."""
        return self._output()[torch.from_numpy(self.order_N[positions])]

    def rows_for(self, positions: slice | Indices) -> Tensor:
        """Return the rows to send for these positions: a view of the held rows where they are one run."""
        if isinstance(positions, slice):
            whole = positions.start == 0 and positions.stop == len(self.order_N)
            return self.rows_ND if whole else self.rows_ND[positions]
        return self.rows_ND[torch.from_numpy(positions).to(self.rows_ND.device)]

    def experts_of(self, positions: slice | Indices) -> Indices:
        experts: Indices = self._experts_TK.cpu().numpy().reshape(-1)[self.order_N[positions]]
        return experts

    def ask_again(self, positions: Indices) -> None:
        """Prepare for a second frame about positions whose first one is no longer awaited."""
        if self._answered_N is None:
            self._account()[positions] = False

    def result(self) -> Tensor:
        """Return the sum over each token's copies, in their order: [T, D]. Call when nothing is missing."""
        assert self.missing == 0, "result asked for while rows are missing"
        y_ND = self._output()
        num_copies = len(self.order_N)
        if num_copies <= self.num_tokens:
            return y_ND
        y_TKD = y_ND.view(self.num_tokens, num_copies // self.num_tokens, -1)
        return sum_copies(y_TKD)

    def prepare(self) -> None:
        """Allocate what replies are written to; call while the hosts compute."""
        self._output()

    def _output(self) -> Tensor:
        """Return where replies go: N rows in the caller's order, allocated on first use."""
        if self._output_ND is None:
            self._output_ND = torch.empty_like(self.rows_ND)
        return self._output_ND

    def _wanted(self, piece: Piece) -> NDArray[np.bool_]:
        """Tell for each row of a piece whether a reply would still count."""
        wanted_R: NDArray[np.bool_] = ~self._account()[piece.positions]
        return wanted_R

    def _account(self) -> NDArray[np.bool_]:
        """Begin to account for single rows; what was answered until now is what no open frame asks for."""
        if self._answered_N is None:
            self._answered_N = np.zeros(len(self.order_N), dtype=np.bool_)
            if self.pieces or self.missing < len(self.order_N):
                self._answered_N[:] = True
                for piece in self.pieces.values():
                    self._answered_N[piece.positions] = False
        return self._answered_N


def sum_copies(y_TKD: Tensor) -> Tensor:
    """Add each token's copies one after the other: slots in their order, and within one the slices of its expert.

    Sums are float32 and rounded once, at the end: partial outputs of a bfloat16 model lose nothing to their number.
    """
    total_TD = y_TKD[:, 0].float()
    for copy in range(1, y_TKD.shape[1]):
        total_TD = total_TD + y_TKD[:, copy]
    return total_TD.to(y_TKD.dtype)


def _as_indices(positions: slice | Indices) -> Indices:
    return np.arange(positions.start, positions.stop) if isinstance(positions, slice) else positions
