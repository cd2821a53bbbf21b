"""What a dispatcher did since a moment, as a span tells it: by expert host its rows and the time its answers took."""

from collections.abc import Sequence

from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.telemetry.tracing import Attributes, ours


class TrafficMark:
    """The counters of the moment it is made, by the thread that moves them."""

    def __init__(self, stats: DispatchStats) -> None:
        self._stats = stats
        self._wait_s = stats.wait_seconds
        self._rows = dict(stats.rows_out)
        self._reply_s = dict(stats.reply_seconds)

    @property
    def wait_s(self) -> float:
        """How long rows were waited for since, with nothing to do."""
        return self._stats.wait_seconds - self._wait_s

    def events(self) -> Sequence[tuple[str, Attributes]]:
        """Return an event for each host that rows were sent to since."""
        reply_s = self._stats.reply_seconds
        return [
            ("expert_host", ours(host=host, rows=rows, reply_s=reply_s.get(host, 0.0) - self._reply_s.get(host, 0.0)))
            for host, total in self._stats.rows_out.items()
            if (rows := total - self._rows.get(host, 0))
        ]
