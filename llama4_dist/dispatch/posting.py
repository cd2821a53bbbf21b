"""Frames out to hosts, and out again to others where a host is lost or refuses. Reads no replies, knows no deadlines.

A frame has a number; what it asks for, and whom, is kept with the dispatch that waits for it until that is answered.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from llama4_dist.dispatch.in_flight import InFlight, Origin, Piece
from llama4_dist.dispatch.layout import Indices, Layout, Share, split
from llama4_dist.dispatch.links.link import Clock, FrameHeader, FrameKind, Link
from llama4_dist.dispatch.links.wait import LinkWaiter
from llama4_dist.dispatch.routes import Routes
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.errors import LinkDownError, UnavailableError

log = logging.getLogger(__name__)

_new_tuple = tuple.__new__  # a quarter of what a named tuple's own constructor takes
OnLost = Callable[[str, int, str], None]  # host, incarnation, reason


class Posting:
    """The links that are up, and the frames that were posted to them."""

    def __init__(
        self,
        routes: Routes,
        links: Mapping[str, Link],
        *,
        clock: Clock,
        stats: DispatchStats,
        on_lost: OnLost,
        last_number: int,
    ) -> None:
        self.routes = routes
        self.links = {host: link for host, link in links.items() if host in routes.published.hosts}
        self.waiter = LinkWaiter(self.links, clock)
        self.active: dict[int, InFlight] = {}  # frame number to the dispatch that waits for it
        self.owed_since: dict[str, tuple[float, int]] = {}  # host to (time, rows) of what nobody waits for any more
        self.last_number = last_number
        self.has_orphans = False  # some active frame's host has no link any more
        self._clock = clock
        self._stats = stats
        self._on_lost = on_lost

    def post(self, in_flight: InFlight, share: Share) -> None:
        """Send one host's share in as few frames as its link takes; keep account after that, while the host works."""
        host, positions, groups, num_rows = share
        link, must_map = self.links.get(host), False
        if link is not None and num_rows > link.limits.max_rows:
            for part in split(share, link.limits.max_rows):
                self.post(in_flight, part)
            return
        self.last_number = number = self.last_number + 1
        layer = in_flight.layer
        lost = ""
        if link is None:
            self.has_orphans = True
        else:
            must_map = bool(self.routes.unmapped) and self.routes.must_map(host, layer, groups)
            kind = FrameKind.ADOPT if must_map else FrameKind.ROWS
            try:
                header = _new_tuple(FrameHeader, (kind, number, *in_flight.origin, num_rows, groups, ""))
                link.post(header, in_flight.rows_for(positions))
            except LinkDownError as error:
                lost = error.reason
        sent_at = self._clock.monotonic()
        fields = (host, positions, groups, num_rows, sent_at, False, must_map)
        in_flight.pieces[number] = _new_tuple(Piece, fields)
        self.active[number] = in_flight
        if lost:
            self._drop_link(host, lost)
        elif link is not None:
            stats = self._stats
            stats.rows_out[host] += num_rows
            stats.frames_out[host] += 1
            stats.bytes_out[host] += num_rows * in_flight.row_bytes

    def post_apart(self, share: Share, origin: Origin, rows_RD: Tensor) -> int | None:
        """Send rows whose answer no dispatch waits for; return the frame's number, None where the host was lost."""
        self.last_number += 1
        header = FrameHeader(FrameKind.ROWS, self.last_number, *origin, share.num_rows, share.groups)
        try:
            self.links[share.host].post(header, rows_RD)
        except LinkDownError as error:
            self.lose((share.host,), error.reason)
            return None
        return self.last_number

    def lose(self, hosts: Iterable[str], reason: str) -> None:
        """Give these hosts' links up and send what they owe elsewhere."""
        for host in hosts:
            self._drop_link(host, reason)
        self.resend_orphans()

    def _drop_link(self, host: str, reason: str) -> None:
        link = self.links.pop(host, None)
        if link is None:
            return
        log.warning("host_lost host=%s reason=%s", host, reason)
        self.waiter.forget(host)
        link.abort()
        self.owed_since.pop(host, None)
        self.routes.lose({host})
        self.has_orphans = True
        self._stats.lost_hosts[reason] += 1
        self._on_lost(host, link.peer_incarnation, reason)

    def resend_orphans(self) -> None:
        """Send rows owed by hosts without a link elsewhere, until no active frame's host is lost."""
        while self.has_orphans:
            self.has_orphans = False
            orphans = [
                (in_flight, number)
                for number, in_flight in self.active.items()
                if in_flight.pieces[number].host not in self.links
            ]
            for in_flight, number in orphans:
                self.resend(in_flight, number)

    def resend(self, in_flight: InFlight, number: int) -> None:
        """Ask for what a frame has not been answered for along the routes of now."""
        piece = in_flight.pieces.pop(number)
        del self.active[number]
        positions = in_flight.unclaimed(piece)
        if not len(positions) or in_flight.error is not None:
            return
        experts = in_flight.experts_of(positions)
        try:
            layout = self.routes.lay_out(in_flight.layer, experts, in_flight.refused)
        except UnavailableError as error:
            in_flight.error = error
            return
        in_flight.ask_again(positions)
        self.send_again(in_flight, positions, layout)

    def send_again(self, in_flight: InFlight, positions: Indices, layout: Layout) -> None:
        """Post these positions once more, laid out over other hosts."""
        positions = positions[layout.order_N]
        self._stats.resent_rows += len(positions)
        for share in layout.shares:
            self.post(in_flight, share._replace(positions=positions[share.positions]))
