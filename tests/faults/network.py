"""Nodes with a cable each to one switch, and faults of the way between them; knows no process that runs on a node."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.fault import Fault, FaultNotVerified, must
from tests.faults.namespaces import Node, ip, make_namespace, remove_namespace
from tests.faults.probe import reaches

SUBNET = "10.213"
CABLE = "cable0"


class Network:
    """Nodes a, b, c ... in namespaces of their own, joined through a router in another.

    A packet is dropped in the router, so that a sender learns nothing: a route in its own namespace would tell it.
    """

    def __init__(self, num_nodes: int = 2) -> None:
        self._router = make_namespace("router")
        self.nodes: list[Node] = []
        try:
            for index in range(num_nodes):
                self.nodes.append(self._add_node(index))
            router = Node(namespace=self._router, address="127.0.0.1")
            router.inside(open_for_forwarding)
        except BaseException:
            self.close()
            raise

    def cable_of(self, node: Node) -> str:
        """Name the router's end of a node's cable."""
        return f"to{self.nodes.index(node)}"

    def router_ip(self, *words: str) -> None:
        """Run `ip` on the router."""
        ip("-n", self._router, *words)

    def close(self) -> None:
        """Remove all namespaces; processes that still run there keep a network of nothing but loopback."""
        for node in self.nodes:
            remove_namespace(node.namespace)
        remove_namespace(self._router)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _add_node(self, index: int) -> Node:
        near, far = f"{SUBNET}.{index}.2", f"{SUBNET}.{index}.1"
        node = Node(namespace=make_namespace(f"node{index}"), address=near)
        cable = ("type", "veth", "peer", "name", f"to{index}", "netns", self._router)
        ip("link", "add", CABLE, "netns", node.namespace, *cable)
        ip("-n", node.namespace, "addr", "add", f"{near}/24", "dev", CABLE)
        ip("-n", node.namespace, "link", "set", CABLE, "up")
        self.router_ip("addr", "add", f"{far}/24", "dev", f"to{index}")
        self.router_ip("link", "set", f"to{index}", "up")
        ip("-n", node.namespace, "route", "add", "default", "via", far)
        return node


def open_for_forwarding() -> None:
    """Let the namespace of this thread forward packets."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


class Partition(Fault):
    """Drops every packet from one node to another, and back unless `one_way`. `aim` is (source, destination)."""

    def __init__(
        self,
        network: Network,
        source: Node,
        destination: Node,
        *,
        one_way: bool = False,
        aim: tuple[Node, Node] | None = None,
    ) -> None:
        self._network = network
        self._cut = [(source, destination)] if one_way else [(source, destination), (destination, source)]
        self._open = [(destination, source)] if one_way else []
        self._aimed = self._cut if aim is None else [aim]
        self._rules: list[tuple[str, ...]] = []

    def inject(self) -> None:
        for source, destination in self._aimed:
            rule = ("iif", self._network.cable_of(source), "to", f"{destination.address}/32", "blackhole")
            self._network.router_ip("rule", "add", *rule)
            self._rules.append(rule)

    def verify(self) -> None:
        """What should be cut is cut, and nothing else."""
        for source, destination in self._cut:
            if reaches(source, destination):
                raise FaultNotVerified(f"{source.address} still reaches {destination.address}")
        self._verify_open(self._open)

    def heal(self) -> None:
        while self._rules:
            self._network.router_ip("rule", "del", *self._rules.pop())

    def verify_healed(self) -> None:
        self._verify_open([*self._cut, *self._open])

    def _verify_open(self, ways: Sequence[tuple[Node, Node]]) -> None:
        for source, destination in ways:
            must(partial(reaches, source, destination), f"{source.address} reaches {destination.address}")


class LinkDown(Fault):
    """Pulls a node's cable out of the router, after `flaps` quick pulls and plugs; the node sees its carrier go."""

    def __init__(self, network: Network, node: Node, *, flaps: int = 0, aim: Node | None = None) -> None:
        self._network, self._node, self._aim = network, node, aim or node
        self._other = next(other for other in network.nodes if other is not node)
        self._flaps = flaps
        self._seen_before = 0

    def inject(self) -> None:
        self._seen_before = self._carrier_changes()
        for _ in range(self._flaps):
            self._set("down")
            self._set("up")
        self._set("down")

    def verify(self) -> None:
        if reaches(self._other, self._node):
            raise FaultNotVerified(f"{self._node.address} is still reached")
        seen, wanted = self._carrier_changes() - self._seen_before, 2 * self._flaps + 1
        if seen < wanted:
            raise FaultNotVerified(f"{self._node.address} saw its carrier change {seen} times, not {wanted}")

    def heal(self) -> None:
        self._set("up")

    def verify_healed(self) -> None:
        must(lambda: reaches(self._other, self._node), f"{self._node.address} is reached again", timeout_s=5.0)

    def _set(self, state: str) -> None:
        self._network.router_ip("link", "set", self._network.cable_of(self._aim), state)

    def _carrier_changes(self) -> int:
        shown = json.loads(ip("-n", self._node.namespace, "-s", "-s", "-j", "link", "show", CABLE))
        return int(shown[0]["stats64"]["tx"]["carrier_changes"])
