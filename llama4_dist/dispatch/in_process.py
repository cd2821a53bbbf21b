"""Asks the one host there is, in this thread, without a frame: a call, and the answers in place. Knows no routes.

Where anything is not as usual nothing is done, and frames go the usual way.
"""

from collections.abc import Mapping, Sequence

from llama4_dist.dispatch.in_flight import InFlight
from llama4_dist.dispatch.layout import Share
from llama4_dist.dispatch.links.inproc import InprocLink
from llama4_dist.dispatch.links.link import Link
from llama4_dist.dispatch.stats import DispatchStats


class InProcess:
    """The link to that host, if it is the only one."""

    def __init__(self, links: Mapping[str, Link], stats: DispatchStats) -> None:
        only = next(iter(links.values())) if len(links) == 1 else None
        self._link = only if isinstance(only, InprocLink) else None
        self._stats = stats

    def takes(self, shares: Sequence[Share]) -> bool:
        """Tell whether that host gets all there is to ask, and would answer at once."""
        link = self._link
        return link is not None and len(shares) == 1 and link.can_ask()

    def ask(self, in_flight: InFlight, share: Share) -> bool:
        """Have a share that is all of a dispatch computed; return whether it was, and every value is finite."""
        link, host = self._link, share.host
        if link is None or link.peer != host:
            return False
        y_ND = link.ask(in_flight.layer, share.groups, in_flight.rows_ND)
        if y_ND is None or not in_flight.take_all(y_ND):
            return False
        stats, num_rows, num_bytes = self._stats, share.num_rows, share.num_rows * in_flight.row_bytes
        stats.rows_out[host] += num_rows
        stats.frames_out[host] += 1
        stats.bytes_out[host] += num_bytes
        stats.rows_in[host] += num_rows
        stats.bytes_in[host] += num_bytes
        return True
