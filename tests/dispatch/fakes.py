"""Experts whose answers a reader can check by hand, random tables over any number of hosts, the slow way."""

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import HostIdentity
from llama4_dist.dispatch.links.inproc import Faults, InprocLink, inproc_pair
from llama4_dist.dispatch.links.link import Clock, LinkLimits
from llama4_dist.dispatch.routing_table import Replica, RoutingTable, SliceRef
from llama4_dist.errors import UnavailableError

WIDTH = 8  # D
FFN_WIDTH = 12  # F
NUM_LAYERS = 3
NUM_EXPERTS = 16


class ManualClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds


class ScalingExperts:
    """Column f of expert e in layer l multiplies its input by (l + 1) + e + f, and the columns are added.

    `ranges` gives the columns held of each (layer, expert). Small integers: sums are exact in any order. `room` is how
    many experts it may still adopt.
    """

    def __init__(self, ranges: Mapping[tuple[int, int], tuple[int, int]], *, room: int = 0) -> None:
        self.ranges = dict(ranges)
        self.room = room
        self.calls: deque[tuple[int, tuple[tuple[int, int], ...]]] = deque(maxlen=32)

    @property
    def holds(self) -> frozenset[tuple[int, int]]:
        return frozenset(self.ranges)

    def adopt(self, pairs: Sequence[tuple[int, int]]) -> None:
        if len(pairs) > self.room:
            raise UnavailableError(f"no room for {pairs}", reason="NO_ROOM")
        self.room -= len(pairs)
        self.ranges |= dict.fromkeys(pairs, (0, FFN_WIDTH))

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        self.calls.append((layer, tuple(groups)))
        start = 0
        for expert, count in groups:
            stop = start + count
            torch.mul(x_RD[start:stop], factor(layer, expert, *self.ranges[layer, expert]), out=out_RD[start:stop])
            start = stop
        assert start == len(x_RD) == len(out_RD)


def factor(layer: int, expert: int, start: int = 0, stop: int = FFN_WIDTH) -> float:
    return float(sum(layer + 1 + expert + column for column in range(start, stop)))


def direct(
    layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, table: RoutingTable | None = None
) -> Tensor:
    """What dispatch and combine must give, one copy at a time; slices of the table's first replica in their order."""
    y_TD = torch.zeros_like(x_TD)
    for token, experts in enumerate(experts_TK.tolist()):
        copies = []
        for slot, expert in enumerate(experts):
            cuts = table.replicas[layer, expert][0].slices if table else whole("any")[0].slices
            row_D = x_TD[token] * scores_TK[token, slot]
            copies.append(sum_in_order([row_D * factor(layer, expert, cut.start, cut.stop) for cut in cuts]))
        y_TD[token] = sum_in_order(copies)
    return y_TD


def sum_in_order(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def whole(*hosts: str) -> tuple[Replica, ...]:
    """One whole replica on each of the hosts."""
    return tuple(Replica((SliceRef(host=host, incarnation=0, start=0, stop=FFN_WIDTH),)) for host in hosts)


def cut(*hosts: str) -> Replica:
    """One replica cut evenly over the hosts."""
    size = FFN_WIDTH // len(hosts)
    return Replica(
        tuple(
            SliceRef(host=host, incarnation=0, start=index * size, stop=(index + 1) * size)
            for index, host in enumerate(hosts)
        )
    )


def random_table(num_hosts: int, *, num_replicas: int = 1, seed: int = 0) -> RoutingTable:
    """Each expert of each layer whole on `num_replicas` random hosts."""
    draw = random.Random(seed)
    hosts = [f"host-{index}" for index in range(num_hosts)]
    return RoutingTable(
        epoch=1,
        replicas={
            (layer, expert): whole(*draw.sample(hosts, min(num_replicas, num_hosts)))
            for layer in range(NUM_LAYERS)
            for expert in range(NUM_EXPERTS)
        },
    )


def ranges_of(table: RoutingTable, host: str) -> dict[tuple[int, int], tuple[int, int]]:
    """The columns of each expert that a table puts on a host."""
    return {
        key: (ref.start, ref.stop)
        for key, replicas in table.replicas.items()
        for replica in replicas
        for ref in replica.slices
        if ref.host == host
    }


def random_batch(
    num_tokens: int, num_slots: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, experts_TK (distinct per token), scores_TK."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    experts_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :num_slots].contiguous()
    scores_TK = torch.rand(num_tokens, num_slots, generator=generator).to(dtype)
    return x_TD, experts_TK, scores_TK


def integer_batch(num_tokens: int, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Like `random_batch`, of integers and powers of two: its sums are exact however an expert is cut."""
    x_TD, experts_TK, scores_TK = random_batch(num_tokens, num_slots)
    return (x_TD * 8).round(), experts_TK, torch.exp2((scores_TK * 4).round())


def identity(host: str) -> HostIdentity:
    return HostIdentity(host=host, incarnation=0, model_hash="0" * 64, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS)


class InprocCluster:
    """Hosts of a table in this process; `dispatcher` gives each worker its own links to all of them."""

    def __init__(
        self,
        table: RoutingTable,
        *,
        dtype: torch.dtype = torch.float32,
        limits: LinkLimits | None = None,
        pool_window_s: float = 0.0,
        room: int = 0,
    ) -> None:
        self.table = table
        self.dtype = dtype
        self.limits = limits or LinkLimits(max_rows=256)
        self.clock = ManualClock()
        self.experts = {host: ScalingExperts(ranges_of(table, host), room=room) for host in table.hosts}
        self.servers = {
            host: ExpertServer(
                identity=identity(host),
                compute=self.experts[host],
                width=WIDTH,
                dtype=dtype,
                limits=self.limits,
                pool_window_s=pool_window_s,
            )
            for host in table.hosts
        }
        self.ends: dict[tuple[str, str], InprocLink] = {}  # (worker, host) to the host's end

    def dispatcher(
        self,
        worker: str = "worker-0",
        *,
        to_host: Faults | None = None,
        to_worker: Faults | None = None,
        clock: Clock | None = None,
        **options: Any,
    ) -> Dispatcher:
        links = {}
        for host, server in self.servers.items():
            links[host], end = inproc_pair(
                worker=worker,
                host=host,
                limits=self.limits,
                clock=self.clock,
                to_host=to_host,
                to_worker=to_worker,
            )
            links[host].drive = lambda server=server: server.poll(0.0)
            server.attach(end)
            self.ends[worker, host] = end
        return Dispatcher(
            worker=worker,
            incarnation=0,
            table=self.table,
            links=links,
            width=WIDTH,
            dtype=self.dtype,
            clock=clock or self.clock,
            **options,
        )
