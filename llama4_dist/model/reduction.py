"""Adds up what the ranks of a stage computed of a block; knows no network, only that the ranks' rows can be gathered.

A sum is taken in rank order at every row. A ring's all-reduce adds in an order that depends on a row's place in the
step, so a token's bits would depend on its company. The routed experts' rows come from the one rank that asked for them
and are added after the sum, so it does not matter either which rank that was.

Gathering sends each rank's rows to every other: (ranks - 1) x [T, D] to receive for each block, and [T, D] more for the
routed rows of a mixture-of-experts block. A ring would receive 2 x (ranks - 1) / ranks x [T, D]. On CUDA each such
block waits for the device once, to see whether a rank has no answer from its experts.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llama4_dist.errors import EngineError, Llama4Error, UnavailableError
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.partition import part_of

_FINE, _UNAVAILABLE, _FAILED = range(3)


class Ranks(Protocol):
    """A rank's way to the others of its stage. All of them must call in the same order, with the same shapes."""

    rank: int
    num_ranks: int
    device: torch.device

    def gather(self, own_ND: Tensor) -> Tensor:
        """Return all ranks' tensors [num_ranks, N, D] in rank order; the caller may overwrite them.

        Raises UnavailableError (WORKER_LOST), after a bounded time, where a rank does not take part; then the group is
        of no use any more.
        """

    def abort(self) -> None:
        """Leave the group without warning, so that the others do not wait."""


class Reduction:
    """What a decoder whose layers are cut asks of its rank. A decoder that is alone has none.

    `agreed` is the last error that all ranks raised together: after it, and after no other, they are still in step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.agreed: Llama4Error | None = None

    def add(self, x_TD: Tensor, partial_TD: Tensor) -> None:
        """Add the sum of all ranks' partial outputs to the residual stream in place; the sum is taken in float32."""
        x_TD += _sum(self.ranks.gather(partial_TD)).to(x_TD.dtype)

    def add_with_routed(self, x_TD: Tensor, partial_TD: Tensor, routed_RD: Tensor | Llama4Error | None) -> None:
        """Do the same, and add the routed experts' rows, of which this rank has its own.

        A rank whose experts could not be had says so instead of leaving the others to wait: then all of them raise.
        """
        num_tokens, width = partial_TD.shape
        num_ranks = self.ranks.num_ranks
        num_routed = -(-num_tokens // num_ranks)  # of the rank that has most
        own_ND = partial_TD.new_zeros(num_tokens + num_routed + 1, width)
        own_ND[:num_tokens] = partial_TD
        if isinstance(routed_RD, Tensor):
            own_ND[num_tokens : num_tokens + len(routed_RD)] = routed_RD
        own_ND[-1, 0] = _status(routed_RD)
        gathered = self.ranks.gather(own_ND)
        self._raise_any(gathered[:, -1, 0].tolist(), routed_RD)
        total_TD = _sum(gathered[:, :num_tokens])
        for rank in range(num_ranks):
            rows = part_of(num_tokens, rank, num_ranks)
            total_TD[rows.start : rows.stop] += gathered[rank, num_tokens : num_tokens + len(rows)]
        x_TD += total_TD.to(x_TD.dtype)

    def agree(self, error: Llama4Error | None) -> None:
        """Raise in every rank where one of them has an error, before any of them computes."""
        status = torch.full((1, 1), float(_status(error)), device=self.ranks.device)
        self._raise_any(self.ranks.gather(status).flatten().tolist(), error)

    def dispatch(
        self,
        dispatcher: Dispatcher,
        layer: int,
        x_TD: Tensor,
        experts_TK: Tensor,
        scores_TK: Tensor,
        microbatch: int,
    ) -> Any:
        """Send this rank's rows to their experts. An error waits for `add_with_routed`, to where the others go on."""
        rows = part_of(len(x_TD), self.ranks.rank, self.ranks.num_ranks)
        own = slice(rows.start, rows.stop)
        if not rows:
            return None
        try:
            return dispatcher.dispatch(layer, x_TD[own], experts_TK[own], scores_TK[own], microbatch)
        except Llama4Error as error:
            return error

    def combine(self, dispatcher: Dispatcher, in_flight: Any) -> Tensor | Llama4Error | None:
        """Return the routed experts' output for this rank's rows, or why there is none."""
        if in_flight is None or isinstance(in_flight, Llama4Error):
            return in_flight
        try:
            return dispatcher.combine(in_flight)
        except Llama4Error as error:
            return error

    def _raise_any(self, statuses: Sequence[float], own: object) -> None:
        self.agreed = _error(statuses, own)
        if self.agreed is not None:
            raise self.agreed


def embed(embedding_VD: Tensor, token_ids_T: Tensor, vocabulary: range, reduction: Reduction | None) -> Tensor:
    """Return the embedding [T, D] of tokens of which this rank holds those in `vocabulary`."""
    if reduction is None:
        return embedding_VD.index_select(0, token_ids_T)
    own_T = token_ids_T - vocabulary.start
    is_foreign_T = (own_T < 0) | (own_T >= len(vocabulary))
    rows_TD = embedding_VD.index_select(0, own_T.clamp(0, len(vocabulary) - 1))
    x_TD = torch.zeros_like(rows_TD)
    reduction.add(x_TD, rows_TD.masked_fill_(is_foreign_T[:, None], 0.0))  # one rank's row, and zeros
    return x_TD


def _sum(gathered: Tensor) -> Tensor:
    total_TD = gathered[0].float()
    for partial_TD in gathered[1:]:
        total_TD += partial_TD
    return total_TD


def _status(outcome: object) -> int:
    if isinstance(outcome, UnavailableError):
        return _UNAVAILABLE
    return _FAILED if isinstance(outcome, Llama4Error) else _FINE


def _error(statuses: Sequence[float], own: object) -> Llama4Error | None:
    if isinstance(own, Llama4Error):
        return own
    failed = {rank: status for rank, status in enumerate(statuses) if status != _FINE}
    if not failed:
        return None
    if all(status == _UNAVAILABLE for status in failed.values()):
        message = f"ranks {sorted(failed)} of this stage could not reach an expert: retry"
        return UnavailableError(message, reason="EXPERT_UNREACHABLE")
    return EngineError(f"ranks {sorted(failed)} of this stage failed in a step; their logs say why")
