"""Measures the way from one node to another with numbered datagrams, one direction at a time; changes nothing."""

import contextlib
import socket
import statistics
import time
from dataclasses import dataclass

from tests.faults.namespaces import Node

NUMBER_BYTES = 8
SETTLE_S = 0.25  # how long a datagram may still be under way when the last one was sent, beyond the delay looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What happened to the datagrams of one probe."""

    num_sent: int
    numbers: tuple[int, ...]  # in order of arrival
    delays_s: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Share of the datagrams that never arrived."""
        return 1 - len(set(self.numbers)) / self.num_sent

    @property
    def num_duplicates(self) -> int:
        return len(self.numbers) - len(set(self.numbers))

    @property
    def num_late(self) -> int:
        """Datagrams that arrived after one sent later."""
        return sum(number < max(self.numbers[:place], default=-1) for place, number in enumerate(self.numbers))

    @property
    def median_delay_s(self) -> float:
        return statistics.median(self.delays_s) if self.delays_s else float("inf")


def probe(source: Node, destination: Node, *, count: int = 5, gap_s: float = 0.005, patience_s: float = 0.0) -> Passage:
    """Send `count` datagrams and collect what arrives, until all did or `patience_s` and a little more passed."""
    receiver = destination.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sender = source.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with receiver, sender:
        receiver.bind((destination.address, 0))
        target = receiver.getsockname()
        sent_s: list[float] = []
        arrived: list[tuple[int, float]] = []
        for number in range(count):
            sent_s.append(time.monotonic())
            with contextlib.suppress(OSError):  # no route at all is a way of not arriving
                sender.sendto(number.to_bytes(NUMBER_BYTES, "big"), target)
            collect(receiver, arrived, until_s=time.monotonic() + gap_s)
        collect(receiver, arrived, until_s=time.monotonic() + patience_s + SETTLE_S, enough=count)
    return Passage(
        num_sent=count,
        numbers=tuple(number for number, _ in arrived),
        delays_s=tuple(at_s - sent_s[number] for number, at_s in arrived),
    )


def collect(
    receiver: socket.socket, arrived: list[tuple[int, float]], *, until_s: float, enough: int | None = None
) -> None:
    """Note what arrives, and when."""
    while (left_s := until_s - time.monotonic()) > 0 and (enough is None or len(arrived) < enough):
        receiver.settimeout(left_s)
        try:
            number = int.from_bytes(receiver.recv(NUMBER_BYTES), "big")
        except TimeoutError:
            return
        arrived.append((number, time.monotonic()))


def reaches(source: Node, destination: Node) -> bool:
    """Tell whether datagrams get from one node to the other."""
    return probe(source, destination, count=3).loss < 1
