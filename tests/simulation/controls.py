"""Switches that turn one mechanism off each, to prove that schedules notice. Used by controls alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cluster.control_plane.change import ChangeRun
from cluster.control_plane.watch import Watch
from cluster.data_plane.epochs import Epochs
from cluster.data_plane.host_links import HostLinks
from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.exchange import Exchange
from llama4_dist.dispatch.in_flight import InFlight
from llama4_dist.dispatch.overdue import Overdue
from llama4_dist.dispatch.posting import Posting
from llama4_dist.dispatch.routes import Routes
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.scheduler import Scheduler


def _no_resend(posting: Posting) -> None:
    posting.has_orphans = False


def _no_adoption(routes: Routes, pairs: Any, refusers: Any) -> bool:
    return False


def _no_hedge(overdue: Overdue, in_flight: Any, number: int, now_s: float) -> None:
    in_flight.pieces[number] = in_flight.pieces[number]._replace(hedged=True)


def _count_again(in_flight: InFlight, piece: Any) -> Any:
    return np.ones(piece.num_rows, dtype=np.bool_)


def _ignore_refusal(exchange: Exchange, in_flight: Any, header: Any, reason: str, experts: list[int]) -> None:
    pass


def _fail_at_once(core: EngineCore, held: Mapping[Any, Any]) -> list[Any]:
    return [core._end(sequence, error=error) for sequence, error in tuple(held.items())]


_check, _commit, _release, _new_exchange = (
    Epochs.check, ChangeRun._commit, Scheduler._release, Dispatcher._new_exchange,
)  # fmt: skip


def _any_epoch(epochs: Epochs, topology: Any) -> None:
    known, epochs.topology = epochs.topology, None
    _check(epochs, topology)
    epochs.topology = known


def _free_first(change: ChangeRun, topology: Any) -> None:
    change._free(topology)
    _commit(change, topology)


def _numbers_again(dispatcher: Dispatcher, table: Any, links: Any, *, last_number: int) -> Exchange:
    return _new_exchange(dispatcher, table, links, last_number=0)


def _keep_cached(scheduler: Scheduler, sequence: Any) -> None:
    num_cached = sequence.num_cached
    _release(scheduler, sequence)
    sequence.num_cached = min(num_cached, 1) if sequence.request_id in scheduler._by_id else 0


def _nothing(*arguments: Any) -> None:
    pass


OFF: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "resend of orphans": (Posting, "resend_orphans", _no_resend),
    "adoption": (Routes, "_adopt", _no_adoption),
    "hedging": (Overdue, "_hedge", _no_hedge),
    "late replies dropped": (InFlight, "_wanted", _count_again),
    "frame numbers go on": (Dispatcher, "_new_exchange", _numbers_again),
    "refusals": (Exchange, "_refused", _ignore_refusal),
    "strayed experts": (Routes, "stray", _nothing),
    "engine hold": (EngineCore, "_hold", _fail_at_once),
    "epoch check": (Epochs, "check", _any_epoch),
    "keep only after ack": (ChangeRun, "_commit", _free_first),
    "repair": (Watch, "_repair", _nothing),
    "catching up": (Watch, "_catch_up", _nothing),
    "dialling again": (HostLinks, "_dial_again", _nothing),
    "cross-check": (CrossCheck, "due", lambda checks: False),
    "recompute after preemption": (Scheduler, "_release", _keep_cached),
}


@contextmanager
def without(mechanism: str) -> Iterator[None]:
    """Turn a mechanism off; "" turns none off."""
    if not mechanism:
        yield
        return
    owner, name, switched_off = OFF[mechanism]
    original = getattr(owner, name)
    setattr(owner, name, switched_off)
    try:
        yield
    finally:
        setattr(owner, name, original)
