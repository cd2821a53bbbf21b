"""Replies of hosts, each matched with the rows that its frame asked for; and all a dispatcher asks of its hosts.

The first valid reply of a row counts, later ones are dropped. Knows no model. Frames leave by `posting`, deadlines are
in `overdue`.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.in_flight import InFlight
from llama4_dist.dispatch.in_process import InProcess
from llama4_dist.dispatch.layout import Share, cut
from llama4_dist.dispatch.links.link import Clock, Frame, FrameHeader, FrameKind, Link
from llama4_dist.dispatch.overdue import Overdue
from llama4_dist.dispatch.posting import OnLost, Posting
from llama4_dist.dispatch.reply_times import ReplyTimes
from llama4_dist.dispatch.routes import WRONG_OWNER, Routes
from llama4_dist.dispatch.row_passes import all_finite
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.errors import EngineError, FrameError, LinkDownError

log = logging.getLogger(__name__)


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
        self.posting = posting = Posting(
            routes, links, clock=clock, stats=stats, on_lost=on_lost, last_number=last_number
        )
        # Read once per frame: the very objects of `posting`, one attribute nearer.
        self.routes, self.links, self.waiter, self.active = routes, posting.links, posting.waiter, posting.active
        self._owed_since = posting.owed_since
        self._overdue = Overdue(posting, times, stats)
        self._in_process = InProcess(self.links, stats)
        self._part_rows = part_rows  # a socket's share of twice as many is cut
        self._clock = clock
        self._stats = stats
        self._times = times
        self._checks = checks

    @property
    def last_number(self) -> int:
        """The number of the last frame posted."""
        return self.posting.last_number

    def send(self, in_flight: InFlight, shares: Iterable[Share]) -> None:
        """Post shares of the rows `in_flight` holds as they come; what a dead link cannot take is sent elsewhere."""
        posting = self.posting
        for share in shares:
            posting.post(in_flight, share)
        in_flight.prepare()
        if posting.has_orphans:
            posting.resend_orphans()

    def parts(self, share: Share) -> Iterable[Share]:
        """Cut a large share for another process, so that one part is computed while the next is on its way."""
        link = self.links.get(share.host)
        if share.num_rows < 2 * self._part_rows or not isinstance(share.positions, slice):
            return (share,)
        return (share,) if link is None or link.fileno() is None else cut(share, self._part_rows)

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
                self.posting.lose((host,), error.reason)
        return progress

    def enforce(self, in_flight: InFlight, now_s: float) -> float:
        """Hedge what is overdue in a dispatch and give up hosts that owe too long; return when to look again."""
        return self._overdue.enforce(in_flight, now_s)

    def begin_step(self) -> None:
        """Forget what a failed step left in flight; see to hosts that were slow."""
        for in_flight in dict.fromkeys(self.active.values()):  # each once, in the order they were sent
            self.retire(in_flight)
        # What nobody waits for may have come meanwhile.
        self.take_replies(self._checks.hosts | self._owed_since.keys())
        if self._owed_since:
            self._overdue.give_up_silent(self._clock.monotonic())
        if self.routes.suspects.avoided:
            self.routes.expire(self._clock.monotonic())

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
        share = found.shares[0]
        if share.host not in self.links or len(found.shares) > 1:
            return
        number = self.posting.post_apart(share, in_flight.origin, sample.x_RD)
        if number is not None:
            self._checks.await_answer(number, share.host, sample)

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
        answered_after_s = self._clock.monotonic() - piece.sent_at
        self._times.observe(host, piece.num_rows, answered_after_s)
        self._stats.count_reply(host, answered_after_s)
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
            self.posting.lose(liars - {host}, "ANSWER_WRONG")
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
        self.posting.resend(in_flight, header.number)
        self.posting.resend_orphans()
