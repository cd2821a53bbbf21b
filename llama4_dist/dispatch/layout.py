"""Which row goes where: pure functions from expert ids to an order of rows and one share per host; no tensors of rows.

The order sorts copies by (host, expert), so that each host's rows are one contiguous slice and, inside it, each
expert's rows are one run. Copies keep their order within a run. An expert here is a unit (`units`): where experts are
cut, a slice of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.dispatch.routing_table import Replica
from llama4_dist.native.extension import extension

Indices = NDArray[np.int64]
Groups = tuple[tuple[int, int], ...]  # ((expert, num_rows), ...), consecutive

_new_tuple = tuple.__new__  # a quarter of what a named tuple's own constructor takes
_FIRST: Indices = np.zeros(1, dtype=np.int64)
NOWHERE = np.iinfo(np.uint16).max  # key of an expert without a replica


class Share(NamedTuple):
    """What one host gets: `groups` in this order; the rows are `positions` of the laid-out order.

    A named tuple, not a dataclass: one is made per frame, and a frozen dataclass costs five times as much.
    """

    host: str
    positions: slice | Indices
    groups: Groups
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerView:
    """One layer of a routing table with the replica of each expert chosen, prepared for `lay_out`.

    `destinations` are (host, expert) in ascending order; `key_E` gives an expert's place in them.
    """

    destinations: tuple[tuple[str, int], ...]
    missing: tuple[int, ...]  # experts without a replica
    key_E: NDArray[np.uint16]


class Layout(NamedTuple):
    """`order_N[i]` is the copy that stands at position i; `shares` are the frames to send."""

    order_N: Indices
    shares: list[Share]


class NoReplicaError(Exception):
    """An expert that rows go to has no replica left; the dispatcher turns it into `UnavailableError`."""

    def __init__(self, expert: int) -> None:
        super().__init__(f"expert {expert} has no replica")
        self.expert = expert


def view_layer(
    replicas: Mapping[int, Sequence[Replica]],
    *,
    excluded: AbstractSet[tuple[str, int]] = frozenset(),
    avoided: AbstractSet[str] = frozenset(),
) -> LayerView:
    """Choose each expert's first replica that no `excluded` (host, expert) bars; those on `avoided` hosts come last."""
    chosen: dict[int, str] = {}
    for expert, candidates in replicas.items():
        allowed = [one.host for one in candidates if (one.host, expert) not in excluded]
        if allowed:
            chosen[expert] = next((host for host in allowed if host not in avoided), allowed[0])
    destinations = tuple(sorted((host, expert) for expert, host in chosen.items()))
    num_experts = max(replicas, default=-1) + 1
    key_E = np.full(num_experts, NOWHERE, dtype=np.uint16)
    for key, (_, expert) in enumerate(destinations):
        key_E[expert] = key
    missing = tuple(expert for expert in range(num_experts) if expert not in chosen)
    return LayerView(destinations=destinations, missing=missing, key_E=key_E)


def lay_out(view: LayerView, experts_N: Indices) -> Layout:
    """Lay out the copies whose experts are `experts_N`; ValueError for an expert the model does not have."""
    if experts_N.size == 1:  # decode of one sequence: nothing to sort
        host, expert = _destination(view, int(experts_N[0]))
        return Layout(_FIRST, [Share(host, slice(0, 1), ((expert, 1),), 1)])
    order_N, counts_E = _sort(view, experts_N)
    shares: list[Share] = []
    host, host_start, stop = "", 0, 0
    groups: list[tuple[int, int]] = []
    for destination, expert in view.destinations:
        count = counts_E[expert]
        if not count:
            continue
        if destination != host:
            if groups:
                shares.append(Share(host, slice(host_start, stop), tuple(groups), stop - host_start))
            host, host_start, groups = destination, stop, []
        groups.append((expert, count))
        stop += count
    if groups:
        shares.append(Share(host, slice(host_start, stop), tuple(groups), stop - host_start))
    return Layout(order_N, shares)


def lay_out_tensor(view: LayerView, experts_TK: Tensor) -> Layout:
    """Do the same with expert ids that a router gives: int64, on any device."""
    native = extension()
    if native is not None and experts_TK.is_cpu and experts_TK.is_contiguous():
        num_copies = experts_TK.numel()
        order_N = _FIRST if num_copies == 1 else np.empty(num_copies, dtype=np.int64)
        experts = experts_TK.data_ptr()
        if experts_TK.dtype == torch.int64:
            shares = native.lay_out(Share, view.destinations, view.key_E, experts, num_copies, order_N)
            if shares is not None:  # otherwise some expert has no destination
                return _new_tuple(Layout, (order_N, shares))
    return lay_out(view, experts_TK.cpu().numpy().reshape(-1))


def split(share: Share, max_rows: int) -> Iterator[Share]:
    """Cut a share into shares of at most `max_rows` rows; an expert's run may be cut."""
    groups: list[tuple[int, int]] = []
    start = filled = 0
    for expert, count in share.groups:
        while count:
            taken = min(count, max_rows - filled)
            groups.append((expert, taken))
            count -= taken
            filled += taken
            if filled == max_rows:
                yield _part(share, start, tuple(groups), filled)
                start, filled, groups = start + filled, 0, []
    if groups:
        yield _part(share, start, tuple(groups), filled)


def cut(share: Share, part_rows: int) -> Iterator[Share]:
    """Cut a share between experts into parts of about `part_rows` rows: no expert is computed in two parts."""
    num_parts = share.num_rows // part_rows
    start = filled = done = 0
    groups: list[tuple[int, int]] = []
    for group in share.groups:
        groups.append(group)
        filled += group[1]
        if (start + filled) * num_parts >= (done + 1) * share.num_rows:
            yield _part(share, start, tuple(groups), filled)
            start, filled, groups = start + filled, 0, []
            done = start * num_parts // share.num_rows


def _destination(view: LayerView, expert: int) -> tuple[str, int]:
    if not 0 <= expert < len(view.key_E):
        raise ValueError(f"expert {expert} is outside [0, {len(view.key_E)})")
    key = int(view.key_E[expert])
    if key == NOWHERE:
        raise NoReplicaError(expert)
    return view.destinations[key]


def _sort(view: LayerView, experts_N: Indices) -> tuple[Indices, list[int]]:
    """Return the stable order by key, and the number of copies of each expert."""
    try:
        keys_N = view.key_E.take(experts_N)  # refuses what is too large
        counts_E = np.bincount(experts_N, minlength=len(view.key_E))  # refuses what is negative
    except (IndexError, ValueError):
        found = f"experts {experts_N.min()} to {experts_N.max()}"
        raise ValueError(f"{found}: some are outside [0, {len(view.key_E)})") from None
    for expert in view.missing:
        if counts_E[expert]:
            raise NoReplicaError(expert)
    order_N = keys_N.argsort(kind="stable")  # radix sort: 16-bit keys
    return order_N, counts_E.tolist()


def _part(share: Share, start: int, groups: Groups, num_rows: int) -> Share:
    positions = share.positions
    if isinstance(positions, slice):
        positions = slice(positions.start + start, positions.start + start + num_rows)
    else:
        positions = positions[start : start + num_rows]
    return Share(share.host, positions, groups, num_rows)
