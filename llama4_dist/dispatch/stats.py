"""Counters of the two halves of dispatch; plain numbers, read by metrics and by the rebalancer."""

from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from llama4_dist.stations import BOUNDS_S


@dataclass(slots=True)
class DispatchStats:
    """An attention worker's view, since it began. Rows and frames are counted when posted, replies when accepted."""

    rows_out: Counter[str] = field(default_factory=Counter)  # per host
    frames_out: Counter[str] = field(default_factory=Counter)
    bytes_out: Counter[str] = field(default_factory=Counter)  # row bytes
    rows_in: Counter[str] = field(default_factory=Counter)
    bytes_in: Counter[str] = field(default_factory=Counter)
    wait_seconds: float = 0.0  # spent in `combine` without anything to do
    resent_rows: int = 0  # hedges included
    hedged: Counter[str] = field(default_factory=Counter)  # rows asked of a replica too, per host that was slow
    checked_frames: int = 0  # answers compared with another host's
    wrong_answers: Counter[str] = field(default_factory=Counter)  # per host proved wrong
    late_replies: int = 0  # late, duplicate or stale; dropped
    refusals: Counter[str] = field(default_factory=Counter)  # NACK reason
    lost_hosts: Counter[str] = field(default_factory=Counter)  # reason a link was given up
    reply_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # per host, summed
    replies_by_bucket: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    transports: dict[str, str] = field(default_factory=dict)  # how rows get to a host: inproc, unix or tcp

    @property
    def hedged_rows(self) -> int:
        """Rows asked of a replica too, over all hosts."""
        return self.hedged.total()

    def count_reply(self, host: str, seconds: float) -> None:
        """Count the time from the posting of a frame to the arrival of its answer."""
        self.reply_seconds[host] += seconds
        self.replies_by_bucket[bisect_left(BOUNDS_S, seconds)] += 1


@dataclass(slots=True)
class HostStats:
    """An expert host's view, since it began."""

    rows_by_expert: Counter[tuple[int, int]] = field(default_factory=Counter)  # (layer, expert)
    rows_by_worker: Counter[str] = field(default_factory=Counter)
    frames_in: int = 0
    replies: int = 0
    refusals: Counter[str] = field(default_factory=Counter)  # NACK reason
    closed_links: Counter[str] = field(default_factory=Counter)  # reason a link or a half-open connection was closed
    computations: int = 0
    pooled_frames: int = 0  # frames that shared a computation with another
    compute_seconds: float = 0.0
    queue_depth: int = 0  # frames waiting now
    links: int = 0  # links up now
    adopted: int = 0  # (layer, expert) pairs brought here because no other host served them
