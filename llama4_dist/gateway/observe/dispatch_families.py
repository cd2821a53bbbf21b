"""The families of whoever sends rows to expert hosts: attention workers, and the members of attention groups.

One name means one thing: a worker that is not cut is a group of its own, with one stage of one rank. So sums by `group`
are those of a model copy, and sums by `host` are right whoever sent.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import Metric

from llama4_dist.dispatch.stats import DispatchCounters
from llama4_dist.gateway.observe.family import Distribution, counter, histogram
from llama4_dist.stations import BOUNDS_S


class Sender(NamedTuple):
    """Who sent: a worker, the group it is of (its leader's name), its place in it."""

    worker: str
    group: str
    stage: str
    rank: str


SENDER = Sender._fields

# Families of one number of `DispatchCounters`, named by its field.
NUMBERS = {
    "wait_on_experts_s": counter(
        "attention_wait_on_experts_seconds", "Time steps waited for expert rows with nothing to do.", *SENDER
    ),
    "resent_rows": counter("dispatch_resent_rows", "Rows asked of another host, hedges included.", *SENDER),
    "late_replies": counter("dispatch_late_replies", "Answers that came after another's had counted.", *SENDER),
    "checked_frames": counter("dispatch_checked_frames", "Answers compared with another host's.", *SENDER),
}
# Families of one mapping by host; each host that there was a link to has a series, for a rate needs a number before.
BY_HOST = {
    "host_rows": counter("dispatch_rows", "Rows sent to expert hosts.", *SENDER, "host"),
    "reply_seconds": counter("dispatch_reply_seconds", "Sum of the times from a frame to its answer.", *SENDER, "host"),
    "hedged_rows": counter("dispatch_hedged_rows", "Rows asked of a replica too, by the slow host.", *SENDER, "host"),
    "wrong_answers": counter("dispatch_wrong_answers", "Answers proved wrong, by who gave them.", *SENDER, "host"),
}
BY_REASON = {
    "refused_frames": counter("dispatch_refusals", "Frames that hosts refused.", *SENDER, "reason"),
    "lost_links": counter("dispatch_links_lost", "Links to hosts that were given up.", *SENDER, "reason"),
}
BYTES = counter(
    "dispatch_bytes", "Bytes of rows, without frames around them.", *SENDER, "host", "direction", "transport"
)
LATENCY = histogram("dispatch_latency_seconds", "Time from a frame of rows to its answer.", BOUNDS_S, *SENDER)

DISPATCH_FAMILIES = (*NUMBERS.values(), *BY_HOST.values(), *BY_REASON.values(), BYTES, LATENCY)


def alone(worker: str) -> Sender:
    """Return the labels of a worker that is not cut."""
    return Sender(worker, worker, "0", "0")


def dispatch_metrics(counters: Mapping[Sender, DispatchCounters]) -> Iterator[Metric]:
    """Translate the counters of all senders; who never had a link to a host is none, and has no series."""
    found = {sender: one for sender, one in counters.items() if one.host_transports}
    for field, family in NUMBERS.items():
        yield family.of(*((sender, getattr(one, field)) for sender, one in found.items()))
    for field, family in BY_HOST.items():
        by_host = ((sender, getattr(one, field), one.host_transports) for sender, one in found.items())
        yield family.of(*(((*sender, host), of.get(host, 0)) for sender, of, hosts in by_host for host in hosts))
    for field, family in BY_REASON.items():
        by_reason = ((sender, getattr(one, field)) for sender, one in found.items())
        yield family.of(*(((*sender, why), number) for sender, of in by_reason for why, number in of.items()))
    yield BYTES.of(*(sample for sender, one in found.items() for sample in _bytes(sender, one)))
    yield LATENCY.spread((sender, replies(one)) for sender, one in found.items())


def replies(counters: DispatchCounters) -> Distribution:
    """Return how long answers took."""
    counts = [counters.replies.get(str(place), 0) for place in range(len(BOUNDS_S) + 1)]
    return Distribution(counts=counts, total=sum(counters.reply_seconds.values()))


def _bytes(sender: Sender, one: DispatchCounters) -> Iterator[tuple[tuple[str, ...], float]]:
    for direction, by_host in (("out", one.host_bytes_out), ("in", one.host_bytes_in)):
        for host, num_bytes in by_host.items():
            yield (*sender, host, direction, one.host_transports.get(host, "")), num_bytes
