"""Frames to hosts and replies from them: numbering, matching, refusals, lost hosts. Knows no tensors of the model.

A frame has a number; the exchange keeps which rows that number asked for. The first valid reply of a row counts, later
ones are dropped. Rows owed by a lost host, or refused by one, go to another replica; without one the dispatch fails.
"""

import logging
from collections.abc import Iterable, Mapping

from llama4_dist.dispatch.in_flight import InFlight, Piece
from llama4_dist.dispatch.layout import (
    Indices,
    LayerView,
    Layout,
    NoReplicaError,
    Share,
    cut,
    lay_out,
    split,
    view_layer,
)
from llama4_dist.dispatch.links.link import Clock, Frame, FrameHeader, FrameKind, Link
from llama4_dist.dispatch.links.wait import LinkWaiter
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.dispatch.row_passes import all_finite
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.errors import EngineError, FrameError, LinkDownError, UnavailableError

log = logging.getLogger(__name__)


class Exchange:
    """One attention worker's frames on one set of links under one routing table."""

    def __init__(
        self,
        table: RoutingTable,
        links: Mapping[str, Link],
        clock: Clock,
        stats: DispatchStats,
        last_number: int,
        part_rows: int,
    ) -> None:
        self.links = {host: link for host, link in links.items() if host in table.hosts}
        self.waiter = LinkWaiter(self.links, clock)
        for host in table.hosts - self.links.keys():
            table = table.without(host)
        self.table = table  # as published, less the hosts lost since
        self.active: dict[int, InFlight] = {}  # frame number to the dispatch that waits for it
        self.last_number = last_number
        self._part_rows = part_rows  # a socket's share of twice as many is cut
        self._views: dict[int, LayerView] = {}
        self._stats = stats
        self._has_orphans = False  # some active frame's host has no link any more

    def lay_out(self, layer: int, experts_N: Indices) -> tuple[Layout, LayerView]:
        """Lay out copies under the table in use; UnavailableError when an expert has no live replica."""
        view = self._views.get(layer)
        if view is None:
            view = self._views[layer] = view_layer(self.table.by_layer.get(layer, {}))
        try:
            return lay_out(view, experts_N), view
        except NoReplicaError as error:
            raise _unreachable(layer, error.expert) from None

    def send(self, in_flight: InFlight, shares: Iterable[Share]) -> None:
        """Post shares of the rows `in_flight` holds as they come; what a dead link cannot take is sent elsewhere."""
        for share in shares:
            self._post(in_flight, share)
        in_flight.prepare()
        if self._has_orphans:
            self._resend_orphans()

    def take_replies(self, hosts: Iterable[str]) -> bool:
        """Read what has arrived from these hosts; return whether anything did."""
        progress = False
        for host in hosts:
            link = self.links.get(host)
            if link is None:
                continue
            try:
                for frame in link.poll(0.0):
                    progress = True
                    try:
                        self._take(host, frame)
                    finally:
                        frame.release()
            except LinkDownError as error:
                progress = True
                self.lose((host,), error.reason)
        return progress

    def lose(self, hosts: Iterable[str], reason: str) -> None:
        """Give these hosts' links up and send what they owe elsewhere."""
        for host in hosts:
            self._drop_link(host, reason)
        self._resend_orphans()

    def is_sending(self) -> bool:
        """Tell whether some link still reads rows that were posted."""
        return any([link.num_unsent for link in self.links.values()])  # noqa: C419 - a list is faster than a generator

    def retire(self, in_flight: InFlight) -> None:
        """Forget the frames of a finished dispatch; their replies will count as late."""
        for number in in_flight.pieces:
            self.active.pop(number, None)
        in_flight.pieces.clear()

    def parts(self, share: Share) -> Iterable[Share]:
        """Cut a large share for another process, so that one part is computed while the next is on its way."""
        if share.num_rows < 2 * self._part_rows:
            return (share,)
        link = self.links.get(share.host)
        return (share,) if link is None or link.fileno() is None else cut(share, self._part_rows)

    def _post(self, in_flight: InFlight, share: Share) -> None:
        """Send one host's share in as few frames as its link takes; keep account after that, while the host works."""
        host, slice_index, positions, groups, num_rows = share
        link = self.links.get(host)
        if link is not None and num_rows > link.limits.max_rows:
            for part in split(share, link.limits.max_rows):
                self._post(in_flight, part)
            return
        self.last_number = number = self.last_number + 1
        lost = ""
        if link is None:
            self._has_orphans = True
        else:
            try:
                link.post(
                    FrameHeader(FrameKind.ROWS, number, *in_flight.origin, num_rows, groups),
                    in_flight.rows_for(positions),
                )
            except LinkDownError as error:
                lost = error.reason
        in_flight.pieces[number] = Piece(host, slice_index, positions, groups, num_rows, in_flight.attempt)
        self.active[number] = in_flight
        if lost:
            self._drop_link(host, lost)
        elif link is not None:
            stats = self._stats
            stats.rows_out[host] += num_rows
            stats.frames_out[host] += 1
            stats.bytes_out[host] += num_rows * in_flight.row_bytes

    def _drop_link(self, host: str, reason: str) -> None:
        link = self.links.pop(host, None)
        if link is None:
            return
        log.warning("host_lost host=%s reason=%s", host, reason)
        self.waiter.forget(host)
        link.abort()
        self.table = self.table.without(host)
        self._views.clear()
        self._has_orphans = True
        self._stats.lost_hosts[reason] += 1

    def _resend_orphans(self) -> None:
        """Send rows owed by hosts without a link elsewhere, until no active frame's host is lost."""
        while self._has_orphans:
            self._has_orphans = False
            orphans = [
                (in_flight, number)
                for number, in_flight in self.active.items()
                if in_flight.pieces[number].host not in self.links
            ]
            for in_flight, number in orphans:
                self._resend(in_flight, number)

    def _resend(self, in_flight: InFlight, number: int) -> None:
        """Ask for what a frame has not been answered for under the table in use."""
        piece = in_flight.pieces.pop(number)
        del self.active[number]
        positions = in_flight.unanswered(piece)
        if not len(positions) or in_flight.error is not None:
            return
        experts = in_flight.experts_of(positions)
        view = view_layer(self.table.by_layer.get(in_flight.origin.layer, {}), excluded=in_flight.excluded)
        try:
            layout = lay_out(view, experts)
        except NoReplicaError as error:
            in_flight.error = _unreachable(in_flight.origin.layer, error.expert)
            return
        in_flight.ask_again(positions, view.num_slices_E[experts])
        positions = positions[layout.order_N]
        self._stats.resent_rows += len(positions)
        for share in layout.shares:
            self._post(in_flight, share._replace(positions=positions[share.positions]))

    def _take(self, host: str, frame: Frame) -> None:
        """Match one frame to what it answers; FrameError when it answers nothing we ever asked this host."""
        header = frame.header
        number = header.number
        in_flight = self.active.get(number)
        if in_flight is None:
            if number > self.last_number:
                raise FrameError(f"host {host!r} answered unsent frame {number}", reason="UNKNOWN_FRAME")
            self._stats.late_replies += 1
            return
        piece = in_flight.pieces[number]
        if piece.host != host or in_flight.origin != header[2:5] or piece.num_rows != header.num_rows:
            raise FrameError(f"host {host!r} answered frame {number} with {header}", reason="REPLY_MISMATCH")
        if header.kind == FrameKind.NACK:
            self._refused(in_flight, header, header.reason, [expert for expert, _ in header.groups])
            return
        rows_RD = frame.rows_RD
        if header.kind != FrameKind.REPLY or rows_RD is None:
            raise FrameError(f"host {host!r} sent a {header.kind.name} frame to a worker", reason="KIND_UNEXPECTED")
        taken = in_flight.accept(piece, rows_RD)
        if taken is None:
            if not all_finite(in_flight.rows_for(piece.positions)):
                in_flight.error = EngineError(
                    f"layer {header.layer}: rows were not finite before they were sent", reason="ROWS_NOT_FINITE"
                )
            self._refused(in_flight, header, "REPLY_NOT_FINITE", [expert for expert, _ in piece.groups])
            return
        del in_flight.pieces[number], self.active[number]
        self._stats.late_replies += taken == 0
        self._stats.rows_in[host] += taken
        self._stats.bytes_in[host] += rows_RD.nbytes

    def _refused(self, in_flight: InFlight, header: FrameHeader, reason: str, experts: list[int]) -> None:
        """Bar the host for these experts of this dispatch, and send the frame's rows again under that rule."""
        piece = in_flight.pieces[header.number]
        barred = set(experts) & {expert for expert, _ in piece.groups}
        if not barred:
            raise FrameError(f"host {piece.host!r} refused experts {experts} it was not sent", reason="REPLY_MISMATCH")
        log.warning("rows_refused host=%s layer=%d experts=%s reason=%s", piece.host, header.layer, experts, reason)
        self._stats.refusals[reason] += 1
        in_flight.excluded |= {(piece.host, expert) for expert in barred}
        self._resend(in_flight, header.number)
        self._resend_orphans()


def _unreachable(layer: int, expert: int) -> UnavailableError:
    return UnavailableError(
        f"no live host serves expert {expert} of layer {layer}; retry when the cluster has recovered",
        reason="EXPERT_UNREACHABLE",
        metadata={"layer": str(layer), "expert": str(expert)},
    )
