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
    """One posted frame: the positions it asks for, of which attempt, since when, whether a replica was asked too.

    A named tuple because one is made per frame.
    """

    host: str
    slice_index: int
    positions: slice | Indices
    groups: Groups
    num_rows: int
    attempt: int
    sent_at: float
    hedged: bool
    adopts: bool = False  # the host was told to map what it does not hold


Origin = tuple[int, int, int]  # step, microbatch, layer: with the row number, this identifies a row within a worker


class InFlight:
    """One layer's rows between `dispatch` and `combine`. A position is a place in the laid-out order.

    The rows are kept until every reply is accepted, so any of them can be sent again elsewhere. An attempt is counted
    only where experts are cut: partial outputs of two different cuts do not add up. `error` is why it cannot finish.
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
        *("missing", "attempt", "deferred", "layer", "_experts_TK", "_passes", "_outputs", "_books"),
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
        self.missing = num_copies  # (slice, position) pairs without an accepted reply
        self.attempt = 0
        self.deferred: Share | None = None  # what a host of this thread is asked for when the rows are wanted
        self._experts_TK = experts_TK
        self._passes = passes
        self._outputs: list[Tensor | None] = [None]  # per slice, in the caller's order
        self._books: _Books | None = None  # kept once a row may be answered twice, or is cut into slices

    def cut(self, num_slices_E: Indices) -> None:
        """Expect so many slices of each expert."""
        positions = slice(None)
        self._cut(positions, num_slices_E[self.experts_of(positions)])

    def owing(self) -> set[str]:
        """Return the hosts that owe a reply."""
        return {piece.host for piece in self.pieces.values()}

    def take_all(self, rows_ND: Tensor) -> bool:
        """Keep an answer to all rows at once; return whether every value is finite, else nothing counts as answered."""
        if not self._passes.put_if_finite(rows_ND, self.order_N, slice(0, self.missing), self._output(0)):
            return False
        self.missing = 0
        return True

    def accept(self, piece: Piece, rows_RD: Tensor) -> int | None:
        """Keep those rows of a reply that nobody answered before; return how many that were.

        None, and nothing counts as answered, where a value of the reply is not finite.
        """
        positions = piece.positions
        output_ND = self._output(piece.slice_index)
        if self._books is None and isinstance(positions, slice):
            if not self._passes.put_if_finite(rows_RD, self.order_N, positions, output_ND):
                return None
            self.missing -= piece.num_rows
            self.answered.append(piece)
            return piece.num_rows
        if not all_finite(rows_RD):
            return None
        books = self._open_books()
        wanted_R = books.wanted(piece)
        wanted = _as_indices(positions)[wanted_R]
        order_R = self.order_N[wanted]
        self._passes.put_if_finite(rows_RD[torch.from_numpy(wanted_R)], order_R, slice(0, len(wanted)), output_ND)
        books.answered[piece.slice_index][wanted] = True
        self.missing -= len(wanted)
        if len(wanted) == piece.num_rows:
            self.answered.append(piece)
        return len(wanted)

    def unclaimed(self, piece: Piece) -> Indices:
        """Return the positions of a piece that neither a reply nor another frame on its way covers."""
        positions = _as_indices(piece.positions)
        if self._books is None:
            return positions
        wanted_R = self._books.wanted(piece)
        for other in self.pieces.values():
            if other is not piece and other.slice_index == piece.slice_index and other.attempt == piece.attempt:
                wanted_R &= ~np.isin(positions, _as_indices(other.positions))
        unclaimed: Indices = positions[wanted_R]
        return unclaimed

    @property
    def was_cut(self) -> bool:
        """Whether some rows were computed in slices."""
        return len(self._outputs) > 1

    def is_cut(self, positions: Indices) -> bool:
        """Tell whether some of these rows are computed in slices now."""
        return self._books is not None and self._books.num_slices_N[positions].max(initial=1) > 1

    def expect_twice(self) -> None:
        """Prepare for two frames that ask for the same rows."""
        self._open_books()

    def outputs_of(self, positions: Indices) -> Tensor:
        """Return copies of the accepted rows at these positions; call when nothing is missing."""
        return self._output(0)[torch.from_numpy(self.order_N[positions])]

    def rows_for(self, positions: slice | Indices) -> Tensor:
        """Return the rows to send for these positions: a view of the held rows where they are one run."""
        if isinstance(positions, slice):
            whole = positions.start == 0 and positions.stop == len(self.order_N)
            return self.rows_ND if whole else self.rows_ND[positions]
        return self.rows_ND[torch.from_numpy(positions).to(self.rows_ND.device)]

    def experts_of(self, positions: slice | Indices) -> Indices:
        experts: Indices = self._experts_TK.cpu().numpy().reshape(-1)[self.order_N[positions]]
        return experts

    def ask_again(self, positions: Indices, num_slices: Indices) -> None:
        """Prepare for a second frame about these positions; where a cut is involved, earlier slices are void."""
        if self._books is None:
            self._open_books().answered[0][positions] = False
        books = self._open_books()
        if num_slices.max(initial=1) > 1 or books.num_slices_N[positions].max(initial=1) > 1:
            self._cut(positions, num_slices)

    def result(self) -> Tensor:
        """Return the sum over each token's copies, in slot order: [T, D]. Call when nothing is missing."""
        assert self.missing == 0, "result asked for while rows are missing"
        y_ND = self._outputs[0] if self._books is None else self._sum_slices()
        if y_ND is None:
            y_ND = self._output(0)
        num_copies = len(self.order_N)
        if num_copies <= self.num_tokens:
            return y_ND
        num_slots = num_copies // self.num_tokens
        y_TKD = y_ND.view(self.num_tokens, num_slots, -1)
        total_TD = y_TKD[:, 0]
        for slot in range(1, num_slots):
            total_TD = total_TD + y_TKD[:, slot]
        return total_TD

    def prepare(self) -> None:
        """Allocate what replies are written to; call while the hosts compute."""
        self._output(0)

    def _output(self, slice_index: int) -> Tensor:
        """Return where replies of this slice go: N rows in the caller's order, allocated on first use."""
        output_ND = self._outputs[slice_index]
        if output_ND is None:
            output_ND = self._outputs[slice_index] = torch.empty_like(self.rows_ND)
        return output_ND

    def _sum_slices(self) -> Tensor:
        """Add the partial outputs of cut experts in slice order."""
        total_ND = self._output(0)
        for slice_index, output_ND in enumerate(self._outputs[1:], start=1):
            if output_ND is not None and self._books is not None:
                copies = self.order_N[self._books.num_slices_N > slice_index]
                cut = torch.from_numpy(copies).to(total_ND.device)
                total_ND[cut] = total_ND[cut] + output_ND[cut]
        return total_ND

    def _open_books(self) -> "_Books":
        """Begin to account for single rows; what was answered until now is what no open frame asks for."""
        if self._books is None:
            self._books = _Books(len(self.order_N))
            if self.pieces or self.missing < len(self.order_N):
                self._books.answered[0][:] = True
                for piece in self.pieces.values():
                    self._books.answered[0][piece.positions] = False
        return self._books

    def _cut(self, positions: Indices | slice, num_slices: Indices) -> None:
        """Start these positions anew with so many slices each; replies of earlier attempts no longer count."""
        books = self._open_books()
        self.attempt += 1
        books.num_slices_N[positions] = num_slices
        books.attempt_N[positions] = self.attempt
        while len(books.answered) < num_slices.max(initial=1):
            books.answered.append(np.zeros_like(books.answered[0]))
            self._outputs.append(None)
        for answered_N in books.answered:
            answered_N[positions] = False
        self.missing = int(books.num_slices_N.sum()) - sum(int(answered.sum()) for answered in books.answered)


class _Books:
    """Per position: how many slices it takes, which attempt counts, and which slices are answered."""

    def __init__(self, num_rows: int) -> None:
        self.num_slices_N = np.ones(num_rows, dtype=np.int64)
        self.attempt_N = np.zeros(num_rows, dtype=np.int64)
        self.answered = [np.zeros(num_rows, dtype=np.bool_)]

    def wanted(self, piece: Piece) -> NDArray[np.bool_]:
        """Tell for each row of a piece whether a reply would still count."""
        answered_R = self.answered[piece.slice_index][piece.positions]
        wanted_R: NDArray[np.bool_] = ~answered_R & (self.attempt_N[piece.positions] == piece.attempt)
        return wanted_R


def _as_indices(positions: slice | Indices) -> Indices:
    return np.arange(positions.start, positions.stop) if isinstance(positions, slice) else positions
