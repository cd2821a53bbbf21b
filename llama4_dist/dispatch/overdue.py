"""Hosts that let others wait: a replica is asked too for what is overdue (a hedge), and who owes too long is lost."""

import logging
import math

from llama4_dist.dispatch.in_flight import InFlight
from llama4_dist.dispatch.posting import Posting
from llama4_dist.dispatch.reply_times import ReplyTimes
from llama4_dist.dispatch.stats import DispatchStats

log = logging.getLogger(__name__)


class Overdue:
    """Looks at what was posted with the time in hand."""

    def __init__(self, posting: Posting, times: ReplyTimes, stats: DispatchStats) -> None:
        self._posting = posting
        self._times = times
        self._stats = stats

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
            self._posting.lose(late, "REPLY_TIMEOUT")
            return now_s
        return next_s

    def _hedge(self, in_flight: InFlight, number: int, now_s: float) -> None:
        """Ask a replica too for what a slow host owes, and avoid that host for a while."""
        routes = self._posting.routes
        piece = in_flight.pieces[number] = in_flight.pieces[number]._replace(hedged=True)
        routes.miss(piece.host, now_s)
        positions = in_flight.unclaimed(piece)
        experts = in_flight.experts_of(positions)
        refused = in_flight.refused | {(piece.host, expert) for expert, _ in piece.groups}
        found = routes.lay_out_elsewhere(in_flight.layer, experts, refused)
        if not len(positions) or found is None:
            return
        log.info("rows_hedged host=%s layer=%d rows=%d", piece.host, in_flight.layer, len(positions))
        self._stats.hedged[piece.host] += len(positions)
        in_flight.expect_twice()
        self._posting.send_again(in_flight, positions, found)

    def give_up_silent(self, now_s: float) -> None:
        """Give up hosts that owe too long what nobody waits for any more."""
        late = {
            host
            for host, (since_s, num_rows) in self._posting.owed_since.items()
            if now_s - since_s >= self._times.lose_after_s(num_rows)
        }
        self._posting.lose(late, "REPLY_TIMEOUT")
