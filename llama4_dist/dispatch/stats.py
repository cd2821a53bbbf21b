"""Counters of the two halves of dispatch; plain numbers, read by metrics and by the rebalancer."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama4_dist.stations import BOUNDS_S


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchCounters:
    """What whoever sends rows to expert hosts tells of it: counters since it began; `host_*` are per expert host.

    `wait_on_experts_s` is the time steps waited for rows with nothing to do. `resent_rows` were asked of another host,
    `hedged_rows` among them because this one was slow; `late_replies` came after another's had counted;
    `checked_frames` were compared with another host's, and `wrong_answers` are those of a host proved wrong.
    `refused_frames` are by the host's reason, `lost_links` by ours. `reply_seconds` sums the time from a frame to its
    answer, and `replies` counts them by bucket (as text: its place among the bounds of stations). `host_transports`
    says how rows get to a host (inproc, unix or tcp) and names every host there was a link to: who has none sends no
    rows, as the leader of an attention group, whose members do.
    """

    wait_on_experts_s: float = 0.0
    resent_rows: int = 0
    late_replies: int = 0
    checked_frames: int = 0
    host_rows: Mapping[str, int] = field(default_factory=dict)
    host_bytes_out: Mapping[str, int] = field(default_factory=dict)
    host_bytes_in: Mapping[str, int] = field(default_factory=dict)
    host_transports: Mapping[str, str] = field(default_factory=dict)
    hedged_rows: Mapping[str, int] = field(default_factory=dict)
    wrong_answers: Mapping[str, int] = field(default_factory=dict)
    refused_frames: Mapping[str, int] = field(default_factory=dict)
    lost_links: Mapping[str, int] = field(default_factory=dict)
    reply_seconds: Mapping[str, float] = field(default_factory=dict)
    replies: Mapping[str, int] = field(default_factory=dict)


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

    def told(self) -> dict[str, Any]:
        """Copy what is told outside, by the fields of `DispatchCounters`; any thread may ask."""
        return {
            "wait_on_experts_s": self.wait_seconds,
            "resent_rows": self.resent_rows,
            "late_replies": self.late_replies,
            "checked_frames": self.checked_frames,
            "host_rows": dict(self.rows_out),
            "host_bytes_out": dict(self.bytes_out),
            "host_bytes_in": dict(self.bytes_in),
            "host_transports": dict(self.transports),
            "hedged_rows": dict(self.hedged),
            "wrong_answers": dict(self.wrong_answers),
            "refused_frames": dict(self.refusals),
            "lost_links": dict(self.lost_hosts),
            "reply_seconds": dict(self.reply_seconds),
            "replies": {str(place): number for place, number in enumerate(self.replies_by_bucket) if number},
        }


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
