"""The attention worker's half: rows out to the hosts of their experts, replies back in place. Knows no arithmetic.

Llama 4 multiplies an expert's input by the router's score, so rows are scaled before they are sent and `combine` is a
plain sum.
"""

import time
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.exchange import Exchange
from llama4_dist.dispatch.in_flight import InFlight
from llama4_dist.dispatch.layout import Layout, Share
from llama4_dist.dispatch.links.link import Clock, Link
from llama4_dist.dispatch.posting import OnLost
from llama4_dist.dispatch.reply_times import Deadlines, ReplyTimes
from llama4_dist.dispatch.routes import Routes
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.dispatch.row_buffers import RowBuffers
from llama4_dist.dispatch.row_passes import row_passes
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.dispatch.suspects import Suspects
from llama4_dist.dispatch.units import expand

DEFAULT_DEADLINES = Deadlines()
PART_BYTES = 512 * 1024  # large shares are cut into parts of about this size, between experts


class Dispatcher:
    """Sends rows of one attention worker and takes replies. Not thread-safe; one thread owns it.

    `links` maps host ids to links of the incarnation the table names. A host of the table without a link counts as
    lost. `on_lost` is told (host, incarnation, reason) when a link is given up. `checks` compares answers now and then.
    """

    def __init__(  # noqa: PLR0913 - the contract of docs/design.md
        self,
        *,
        worker: str,
        incarnation: int,
        table: RoutingTable,
        links: Mapping[str, Link],
        width: int,
        dtype: torch.dtype,
        device: str = "cpu",
        deadlines: Deadlines = DEFAULT_DEADLINES,
        checks: CrossCheck | None = None,
        on_lost: OnLost = lambda host, incarnation, reason: None,
        clock: Clock = time,
    ) -> None:
        self.worker = worker
        self.incarnation = incarnation
        self._width = width
        self._dtype = dtype
        self._clock = clock
        self._times = ReplyTimes(deadlines)
        self._least_deadline_s = min(deadlines.hedge_floor_s, deadlines.unknown_hedge_s)
        self._suspects = Suspects()
        self._checks = checks or CrossCheck()
        self._on_lost = on_lost
        self._step = 0
        self._device = torch.device(device)
        self._stats = DispatchStats()
        self._part_rows = max(1, PART_BYTES // (width * dtype.itemsize))
        self._exchange = self._new_exchange(table, {}, last_number=0)
        self.switch(table, links)

    @property
    def table(self) -> RoutingTable:
        """The table in use: as published, less the hosts lost since, with the experts adopted since."""
        return self._exchange.routes.table

    @property
    def published(self) -> RoutingTable:
        """The table as `switch` was given it."""
        return self._exchange.routes.published

    @property
    def links(self) -> Mapping[str, Link]:
        """The links that are up; read it between steps only."""
        return self._exchange.links

    @property
    def overlaps(self) -> bool:
        """Whether hosts compute while this thread does something else; those of this process do not."""
        return any(link.fileno() is not None for link in self._exchange.links.values())

    def begin_step(self, step: int) -> None:
        """Name the step that the next dispatches belong to; forget what a failed step left in flight."""
        self._step = step
        self._exchange.begin_step()

    def switch(self, table: RoutingTable, links: Mapping[str, Link]) -> None:
        """Use another table and its links, between steps.

        Links of before that are not in `links` are aborted, and those to hosts that the table does not name.
        """
        old = self._exchange
        if old.active:
            raise ValueError(f"{len(old.active)} frames are in flight; switch tables between steps")
        for host, link in links.items():
            expected = table.incarnations.get(host, link.peer_incarnation)
            if link.peer_incarnation != expected:
                raise ValueError(
                    f"the link to {host!r} reaches incarnation {link.peer_incarnation}, the table names {expected}"
                )
        for host, link in (*old.links.items(), *links.items()):
            # A host that the table gives nothing is sent nothing: its link must not keep it from being dialled later.
            if links.get(host) is not link or host not in table.hosts:
                link.abort()
        self._exchange = self._new_exchange(table, links, last_number=old.last_number)
        self._num_slices = table.num_slices
        self._stats.transports |= {host: link.transport for host, link in links.items()}
        # Sockets read host memory; links inside the process take a GPU's rows as they are.
        on_host = self.overlaps
        device = torch.device("cpu") if on_host else self._device
        self._rows_are_elsewhere = device != self._device
        self._buffers = RowBuffers(
            width=self._width, dtype=self._dtype, device=device, pinned=on_host and self._device.type == "cuda"
        )
        self._passes = row_passes(self._dtype, self._device, self._width)

    def dispatch(
        self, layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, microbatch: int = 0
    ) -> InFlight:
        """Send score x input of every copy to the host of its expert and return at once.

        x_TD [T, D] in the dispatcher's dtype; experts_TK int64 [T, K]; scores_TK [T, K]. Where experts are cut, each
        copy becomes one per slice (`units.expand`). Raises UnavailableError (EXPERT_UNREACHABLE) when an expert has no
        live replica.
        """
        num_tokens, num_slots = shape = experts_TK.shape
        if x_TD.shape != (num_tokens, self._width) or scores_TK.shape != shape or x_TD.dtype != self._dtype:
            raise ValueError(
                f"x {tuple(x_TD.shape)} {x_TD.dtype}, experts {tuple(experts_TK.shape)} and"
                f" scores {tuple(scores_TK.shape)} do not fit: expected [T, {self._width}] {self._dtype}, twice [T, K]"
            )
        exchange = self._exchange
        if self._num_slices > 1:
            experts_TK, scores_TK = expand(experts_TK, scores_TK, self._num_slices)
        layout = exchange.routes.lay_out_rows(layer, experts_TK)
        order_N, shares = layout
        num_copies = num_tokens * num_slots * self._num_slices
        buffer = self._buffers.take(num_copies)
        in_flight = InFlight(
            origin=(self._step, microbatch, layer),
            num_tokens=num_tokens,
            experts_TK=experts_TK,
            order_N=order_N,
            buffer=buffer,
            passes=self._passes,
        )
        if scores_TK.dtype != self._dtype:
            scores_TK = scores_TK.to(self._dtype)
        if exchange.may_defer(shares):
            self._passes.scale_in_order(x_TD, scores_TK, order_N, slice(0, num_copies), in_flight.rows_ND)
            in_flight.deferred = shares[0]
        elif num_copies == 1:  # decode of one sequence: one share, nothing to cut
            self._passes.scale_in_order(x_TD, scores_TK, order_N, slice(0, 1), in_flight.rows_ND)
            exchange.send(in_flight, shares)
        else:
            exchange.send(in_flight, self._in_order(x_TD, scores_TK, layout, in_flight.rows_ND))
        return in_flight

    def _in_order(self, x_TD: Tensor, scores_TK: Tensor, layout: Layout, rows_ND: Tensor) -> Iterator[Share]:
        """Yield each share when its rows are there: the first is on its way while the next is brought in order."""
        order_N, shares = layout
        for whole in shares:
            for share in self._exchange.parts(whole):
                positions = share.positions
                assert isinstance(positions, slice), "a share that is laid out first is one run"
                self._passes.scale_in_order(x_TD, scores_TK, order_N, positions, rows_ND)
                yield share

    def combine(self, in_flight: InFlight) -> Tensor:
        """Wait for the replies and return each token's sum over its copies, in slot and slice order: [T, D].

        Raises UnavailableError (EXPERT_UNREACHABLE) when rows are owed and no live replica is left, and EngineError
        (ROWS_NOT_FINITE) when the rows themselves were not finite.
        """
        exchange = self._exchange
        if in_flight.deferred is not None and exchange.take_deferred(in_flight):
            self._buffers.give_back(in_flight.buffer)
            return in_flight.result()
        has_looked = exchange.look_for_reply(in_flight)
        ready: AbstractSet[str] = frozenset() if exchange.waiter.waits else in_flight.owing()
        next_s = 0.0  # when to look at deadlines; none is shorter than the floor, which spares most steps the look
        while in_flight.missing and in_flight.error is None:
            if exchange.take_replies(ready):
                ready = in_flight.owing() if in_flight.missing else ready
                continue
            now_s = self._clock.monotonic()
            next_s = next_s or now_s + self._least_deadline_s
            if now_s >= next_s:
                next_s = exchange.enforce(in_flight, now_s)
                ready = in_flight.owing()
                continue
            ready = exchange.waiter.wait(next_s - now_s, has_looked)
            has_looked = False
            self._stats.wait_seconds += self._clock.monotonic() - now_s
        exchange.retire(in_flight)
        if in_flight.error is not None:
            raise in_flight.error
        if self._checks.due():
            exchange.check(in_flight)
        if not exchange.is_sending():
            self._buffers.give_back(in_flight.buffer)  # otherwise a link still reads it
        y_TD = in_flight.result()
        return y_TD.to(self._device) if self._rows_are_elsewhere else y_TD

    def stats(self) -> DispatchStats:
        return self._stats

    def close(self) -> None:
        """Abort every link; nothing can be sent afterwards."""
        for link in self._exchange.links.values():
            link.abort()
        self._exchange = self._new_exchange(self.published, {}, last_number=self._exchange.last_number)

    def _new_exchange(self, table: RoutingTable, links: Mapping[str, Link], *, last_number: int) -> Exchange:
        """Make an exchange; frame numbers go on, since a late reply must not meet a new frame."""
        return Exchange(
            Routes(table, links, self._suspects),
            links,
            clock=self._clock,
            stats=self._stats,
            times=self._times,
            checks=self._checks,
            on_lost=self._on_lost,
            last_number=last_number,
            part_rows=self._part_rows,
        )
