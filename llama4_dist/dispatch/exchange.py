"""Frames to hosts and replies from them: numbering, matching, deadlines, refusals, lost hosts. Knows no model.

A frame has a number; the exchange keeps which rows that number asked for. The first valid reply of a row counts, later
ones are dropped. A host that is slow has its rows asked of a replica too (a hedge); what a lost host owes, or a host
refused, goes elsewhere.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.in_flight import InFlight, Piece
from llama4_dist.dispatch.in_process import InProcess
from llama4_dist.dispatch.layout import Indices, Layout, Share, cut, split
from llama4_dist.dispatch.links.link import Clock, Frame, FrameHeader, FrameKind, Link
from llama4_dist.dispatch.links.wait import LinkWaiter
from llama4_dist.dispatch.reply_times import ReplyTimes
from llama4_dist.dispatch.routes import WRONG_OWNER, Routes
from llama4_dist.dispatch.row_passes import all_finite
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.errors import EngineError, FrameError, LinkDownError, UnavailableError

log = logging.getLogger(__name__)

_new_tuple = tuple.__new__  # a quarter of what a named tuple's own constructor takes
OnLost = Callable[[str, int, str], None]  # host, incarnation, reason


class Exchange:
    """One attention worker's frames on one set of links, along its routes."""

    def __init__(  # noqa: PLR0913 - what a dispatcher keeps from one exchange to the next
        self,
        routes: Routes,
        links: Mapping[str, Link],
        *,
        clock: Clock,
        stats: DispatchStats,
        times: ReplyTimes,
        checks: CrossCheck,
        on_lost: OnLost,
        last_number: int,
        part_rows: int,
    ) -> None:
        self.routes = routes
        self.links = {host: link for host, link in links.items() if host in routes.published.hosts}
        self.waiter = LinkWaiter(self.links, clock)
        self._in_process = InProcess(self.links, stats)
        self.active: dict[int, InFlight] = {}  # frame number to the dispatch that waits for it
        self.last_number = last_number
        self._owed_since: dict[str, tuple[float, int]] = {}  # host to (time, rows) of what nobody waits for any more
        self._part_rows = part_rows  # a socket's share of twice as many is cut
        self._clock = clock
        self._stats = stats
        self._times = times
        self._checks = checks
        self._on_lost = on_lost
        self._has_orphans = False  # some active frame's host has no link any more

    def send(self, in_flight: InFlight, shares: Iterable[Share]) -> None:
        """Post shares of the rows `in_flight` holds as they come; what a dead link cannot take is sent elsewhere."""
        for share in shares:
            self._post(in_flight, share)
        in_flight.prepare()
        if self._has_orphans:
            self._resend_orphans()

    def may_defer(self, shares: Sequence[Share]) -> bool:
        """Tell whether these shares need no frames: a host of this thread computes them when they are wanted."""
        return self._in_process.takes(shares) and not self.routes.unmapped

    def take_deferred(self, in_flight: InFlight) -> bool:
        """Have a deferred share computed in this call; False where frames were sent instead."""
        share, in_flight.deferred = in_flight.deferred, None
        assert share is not None, "nothing was deferred"
        if self._in_process.ask(in_flight, share):
            return True
        self.send(in_flight, self.parts(share))
        return False

    def look_for_reply(self, in_flight: InFlight) -> bool:
        """Where one frame is awaited from a socket, look at nothing else for a moment; return whether that was done."""
        patience = self.waiter.patience
        look_s = patience.look_s
        if len(in_flight.pieces) != 1 or not look_s or not self.waiter.waits:
            return False
        (piece,) = in_flight.pieces.values()
        began_s = time.perf_counter()
        self.take_replies((piece.host,), look_s)
        if time.perf_counter() - began_s > 2 * look_s:
            patience.lost_core()
        return True

    def take_replies(self, hosts: Iterable[str], timeout_s: float = 0.0) -> bool:
        """Read what has arrived from these hosts; return whether anything did."""
        progress = False
        for host in hosts:
            link = self.links.get(host)
            if link is None:
                continue
            try:
                for frame in link.poll(timeout_s):
                    progress = True
                    try:
                        self._take(host, frame)
                    finally:
                        frame.release()
            except LinkDownError as error:
                progress = True
                self.lose((host,), error.reason)
        return progress

    def enforce(self, in_flight: InFlight, now_s: float) -> float:
        """Hedge what is overdue in a dispatch and give up hosts that owe too long; return when to look again."""
        next_s = math.inf
        late: set[str] = set()
        for number, piece in tuple(in_flight.pieces.items()):
            lose_s = piece.sent_at + self._times.lose_after_s(piece.num_rows)
            hedge_s = piece.sent_at + self._times.hedge_after_s(piece.num_rows)
            if now_s >= lose_s:
                late.add(piece.host)
            elif not piece.hedged and now_s >= hedge_s:
                self._hedge(in_flight, number, now_s)
            next_s = min(next_s, lose_s if piece.hedged or now_s >= hedge_s else hedge_s)
        if late:
            self.lose(late, "REPLY_TIMEOUT")
            return now_s
        return next_s

    def begin_step(self) -> None:
        """Forget what a failed step left in flight; see to hosts that were slow."""
        for in_flight in dict.fromkeys(self.active.values()):  # each once, in the order they were sent
            self.retire(in_flight)
        # What nobody waits for may have come meanwhile.
        self.take_replies(self._checks.hosts | self._owed_since.keys())
        if self._owed_since:
            now_s = self._clock.monotonic()
            late = {
                host
                for host, (since_s, num_rows) in self._owed_since.items()
                if now_s - since_s >= self._times.lose_after_s(num_rows)
            }
            self.lose(late, "REPLY_TIMEOUT")
        if self.routes.suspects.avoided:
            self.routes.expire(self._clock.monotonic())

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
        for number, piece in in_flight.pieces.items():
            self.active.pop(number, None)
            if piece.host in self.links:
                self._owed_since.setdefault(piece.host, (piece.sent_at, piece.num_rows))
        in_flight.pieces.clear()

    def check(self, in_flight: InFlight) -> None:
        """Ask another host for some rows of a finished dispatch, to compare the answers when they come."""
        sample = self._checks.sample(in_flight)
        if sample is None:
            return
        found = self.routes.lay_out_elsewhere(sample.layer, sample.experts_N, {(sample.host, sample.expert)})
        if found is None:
            return
        share = found[0].shares[0]
        link = self.links.get(share.host)
        if link is None or len(found[0].shares) > 1:
            return
        self.last_number += 1
        header = FrameHeader(
            FrameKind.ROWS, self.last_number, *in_flight.origin, share.num_rows, ((sample.expert, share.num_rows),)
        )
        try:
            link.post(header, sample.x_RD)
        except LinkDownError as error:
            self.lose((share.host,), error.reason)
            return
        self._checks.await_answer(self.last_number, share.host, sample)

    def parts(self, share: Share) -> Iterable[Share]:
        """Cut a large share for another process, so that one part is computed while the next is on its way."""
        link = self.links.get(share.host)
        if share.num_rows < 2 * self._part_rows or not isinstance(share.positions, slice):
            return (share,)
        return (share,) if link is None or link.fileno() is None else cut(share, self._part_rows)

    def _post(self, in_flight: InFlight, share: Share) -> None:
        """Send one host's share in as few frames as its link takes; keep account after that, while the host works."""
        host, slice_index, positions, groups, num_rows = share
        link, must_map = self.links.get(host), False
        if link is not None and num_rows > link.limits.max_rows:
            for part in split(share, link.limits.max_rows):
                self._post(in_flight, part)
            return
        self.last_number = number = self.last_number + 1
        layer = in_flight.layer
        lost = ""
        if link is None:
            self._has_orphans = True
        else:
            must_map = bool(self.routes.unmapped) and self.routes.must_map(host, layer, groups)
            kind = FrameKind.ADOPT if must_map else FrameKind.ROWS
            try:
                header = _new_tuple(FrameHeader, (kind, number, *in_flight.origin, num_rows, groups, ""))
                link.post(header, in_flight.rows_for(positions))
            except LinkDownError as error:
                lost = error.reason
        sent_at = self._clock.monotonic()
        fields = (host, slice_index, positions, groups, num_rows, in_flight.attempt, sent_at, False, must_map)
        in_flight.pieces[number] = _new_tuple(Piece, fields)
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
        self._owed_since.pop(host, None)
        self.routes.lose({host})
        self._has_orphans = True
        self._stats.lost_hosts[reason] += 1
        self._on_lost(host, link.peer_incarnation, reason)

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
        """Ask for what a frame has not been answered for along the routes of now."""
        piece = in_flight.pieces.pop(number)
        del self.active[number]
        positions = in_flight.unclaimed(piece)
        if not len(positions) or in_flight.error is not None:
            return
        experts = in_flight.experts_of(positions)
        try:
            layout, view = self.routes.lay_out(in_flight.layer, experts, in_flight.refused)
        except UnavailableError as error:
            in_flight.error = error
            return
        in_flight.ask_again(positions, view.num_slices_E[experts])
        self._send_again(in_flight, positions, layout)

    def _hedge(self, in_flight: InFlight, number: int, now_s: float) -> None:
        """Ask a replica too for what a slow host owes, and avoid that host for a while."""
        piece = in_flight.pieces[number] = in_flight.pieces[number]._replace(hedged=True)
        self.routes.miss(piece.host, now_s)
        positions = in_flight.unclaimed(piece)
        experts = in_flight.experts_of(positions)
        refused = in_flight.refused | {(piece.host, expert) for expert, _ in piece.groups}
        found = self.routes.lay_out_elsewhere(in_flight.layer, experts, refused)
        # Partial outputs of two different cuts do not add up, so cut experts wait until their host is given up.
        if not len(positions) or found is None or found[1].further or in_flight.is_cut(positions):
            return
        log.info("rows_hedged host=%s layer=%d rows=%d", piece.host, in_flight.layer, len(positions))
        self._stats.hedged_rows += len(positions)
        in_flight.expect_twice()
        self._send_again(in_flight, positions, found[0])

    def _send_again(self, in_flight: InFlight, positions: Indices, layout: Layout) -> None:
        positions = positions[layout.order_N]
        self._stats.resent_rows += len(positions)
        for share in layout.shares:
            self._post(in_flight, share._replace(positions=positions[share.positions]))

    def _take(self, host: str, frame: Frame) -> None:
        """Match one frame to what it answers; FrameError when it answers nothing we ever asked this host."""
        header = frame.header
        number = header.number
        if self._owed_since:
            self._owed_since.pop(host, None)
        in_flight = self.active.get(number)
        if in_flight is None:
            self._take_unawaited(host, frame)
            return
        piece = in_flight.pieces[number]
        if piece.host != host or in_flight.origin != header[2:5] or piece.num_rows != header.num_rows:
            raise FrameError(f"host {host!r} answered frame {number} with {header}", reason="REPLY_MISMATCH")
        self._times.observe(host, piece.num_rows, self._clock.monotonic() - piece.sent_at)
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
        if self.routes.unmapped:
            self.routes.confirm(host, header.layer, piece.groups)
        self._stats.late_replies += taken == 0
        self._stats.rows_in[host] += taken
        self._stats.bytes_in[host] += rows_RD.nbytes

    def _take_unawaited(self, host: str, frame: Frame) -> None:
        """Take the answer to a check, or drop one that came too late to count."""
        number = frame.header.number
        if number > self.last_number:
            raise FrameError(f"host {host!r} answered unsent frame {number}", reason="UNKNOWN_FRAME")
        if not self._checks.awaits(number):
            self._stats.late_replies += 1
            return
        self._stats.checked_frames += 1
        liars = self._checks.compare(number, host, frame)
        if liars:
            self._stats.wrong_answers.update(liars)
            # Not while its frames are being read.
            self.lose(liars - {host}, "ANSWER_WRONG")
            if host in liars:
                raise LinkDownError(f"host {host!r} computes wrong answers", reason="ANSWER_WRONG")

    def _refused(self, in_flight: InFlight, header: FrameHeader, reason: str, experts: list[int]) -> None:
        """Bar the host for these experts of this dispatch, and send the frame's rows again under that rule.

        One that does not hold what it was believed to hold is not barred: it may be told to adopt it.
        """
        piece = in_flight.pieces[header.number]
        barred = set(experts) & {expert for expert, _ in piece.groups}
        if not barred:
            raise FrameError(f"host {piece.host!r} refused experts {experts} it was not sent", reason="REPLY_MISMATCH")
        log.warning("rows_refused host=%s layer=%d experts=%s reason=%s", piece.host, header.layer, experts, reason)
        self._stats.refusals[reason] += 1
        if reason == WRONG_OWNER and not piece.adopts:
            self.routes.stray(piece.host, header.layer, barred)
        else:
            in_flight.refused |= {(piece.host, expert) for expert in barred}
            self.routes.refuse(piece.host, header.layer, barred)
        self._resend(in_flight, header.number)
        self._resend_orphans()
