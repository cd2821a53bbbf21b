"""Nodes joined by a relay that can delay, lose, double and reorder packets; reads only their addresses.

One thread moves every packet (TUN devices; no kernel module for emulation is needed), so it is for faults of the
network, not for measuring speed.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.faults.fault import FaultUnavailable
from tests.faults.namespaces import Node, ip, make_namespace, remove_namespace

SUBNET = "10.214"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
MAX_PACKET = 65536
IDLE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What happens to packets of one direction. `reorder` is the share that overtakes: it skips the delay."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0

    def __post_init__(self) -> None:
        for name in ("loss", "duplicate", "reorder"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is no share: choose from 0 to 1")
        if self.reorder and not self.delay_s:
            raise ValueError("reorder needs a delay_s that packets can skip")


CALM = Weather()


class RelayNetwork:
    """`nodes` on one relay. `set` changes the weather from one node to another while it runs."""

    def __init__(self, num_nodes: int = 2, *, seed: int = 0) -> None:
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            raise FaultUnavailable("/dev/net/tun is not there or not writable")
        self._random = random.Random(seed)
        self._weather: dict[tuple[bytes, bytes], Weather] = {}
        self._descriptors: dict[bytes, int] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []  # due, order of arrival, descriptor, packet
        self._num_packets = 0
        self._is_closing = False
        self._failure: BaseException | None = None
        self.nodes: list[Node] = []
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        try:
            for index in range(num_nodes):
                self._add_node(index)
        except BaseException:
            self._release()
            raise
        self._thread.start()

    def set(self, source: Node, destination: Node, weather: Weather) -> None:
        """Change what happens to packets from one node to another."""
        self._weather[(packed(source.address), packed(destination.address))] = weather

    def close(self) -> None:
        """Stop relaying, remove the nodes; raise what went wrong in the thread, if anything did."""
        self._is_closing = True
        self._thread.join(60)
        self._release()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _add_node(self, index: int) -> None:
        node = Node(namespace=make_namespace(f"relayed{index}"), address=f"{SUBNET}.0.{index + 1}")
        self.nodes.append(node)
        self._descriptors[packed(node.address)] = node.inside(open_tun)
        ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", "tun0")
        ip("-n", node.namespace, "link", "set", "tun0", "up")

    def _release(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        for node in self.nodes:
            remove_namespace(node.namespace)

    def _run(self) -> None:
        try:
            while not self._is_closing:
                now_s = time.monotonic()
                timeout_s = max(0.0, min(IDLE_S, self._waiting[0][0] - now_s)) if self._waiting else IDLE_S
                for descriptor in select.select(list(self._descriptors.values()), [], [], timeout_s)[0]:
                    self._take(os.read(descriptor, MAX_PACKET), time.monotonic())
                while self._waiting and self._waiting[0][0] <= time.monotonic():
                    _, _, descriptor, packet = heapq.heappop(self._waiting)
                    os.write(descriptor, packet)
        except BaseException as failure:  # noqa: BLE001  close() raises it
            self._failure = failure

    def _take(self, packet: bytes, now_s: float) -> None:
        """Decide when a packet goes on, how often, and whether at all."""
        if packet[0] >> 4 != 4:
            return  # version 6: neighbours that nobody asked for
        source, destination = packet[12:16], packet[16:20]  # RFC 791
        weather, draw = self._weather.get((source, destination), CALM), self._random.random
        receiver = self._descriptors.get(destination)
        if receiver is None or draw() < weather.loss:
            return
        for _ in range(1 + (draw() < weather.duplicate)):
            overtakes = draw() < weather.reorder
            due_s = now_s if overtakes else now_s + weather.delay_s + draw() * weather.jitter_s
            self._num_packets += 1
            heapq.heappush(self._waiting, (due_s, self._num_packets, receiver, packet))


def open_tun() -> int:
    """Make tun0 in the namespace of this thread."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def packed(address: str) -> bytes:
    """Return a version 4 address as it stands in a packet."""
    return bytes(int(part) for part in address.split("."))
