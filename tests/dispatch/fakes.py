"""Experts whose answers a reader can check by hand, random tables over any number of hosts, the slow way."""

import random
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import HostIdentity
from llama4_dist.dispatch.links.inproc import Faults, InprocLink, inproc_pair
from llama4_dist.dispatch.links.link import Clock, LinkLimits
from llama4_dist.dispatch.routing_table import Replica, RoutingTable
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

    Units are slices where `num_slices` says so. Small integers: sums are exact in any order. `room` is how many units
    it may still adopt.
    """

    def __init__(self, held: Collection[tuple[int, int]], *, room: int = 0, num_slices: int = 1) -> None:
        self.held = set(held)
        self.room = room
        self.num_slices = num_slices
        self.calls: deque[tuple[int, tuple[tuple[int, int], ...]]] = deque(maxlen=32)

    @property
    def holds(self) -> frozenset[tuple[int, int]]:
        return frozenset(self.held)

    def adopt(self, pairs: Sequence[tuple[int, int]]) -> None:
        if len(pairs) > self.room:
            raise UnavailableError(f"no room for {pairs}", reason="NO_ROOM")
        self.room -= len(pairs)
        self.held |= set(pairs)

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        self.calls.append((layer, tuple(groups)))
        start = 0
        for expert, count in groups:
            stop = start + count
            assert (layer, expert) in self.held
            torch.mul(x_RD[start:stop], factor(layer, expert, self.num_slices), out=out_RD[start:stop])
            start = stop
        assert start == len(x_RD) == len(out_RD)


def factor(layer: int, unit: int, num_slices: int = 1) -> float:
    expert, index = divmod(unit, num_slices)
    size = FFN_WIDTH // num_slices
    return float(sum(layer + 1 + expert + column for column in range(index * size, (index + 1) * size)))


def direct(layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, num_slices: int = 1) -> Tensor:
    """What dispatch and combine must give, one copy at a time; slices in their order."""
    y_TD = torch.zeros_like(x_TD)
    for token, experts in enumerate(experts_TK.tolist()):
        copies = []
        for slot, expert in enumerate(experts):
            row_D = x_TD[token] * scores_TK[token, slot]
            units = range(expert * num_slices, (expert + 1) * num_slices)
            copies += [row_D * factor(layer, unit, num_slices) for unit in units]
        y_TD[token] = sum_in_order(copies)
    return y_TD


def sum_in_order(terms: Sequence[Tensor]) -> Tensor:
    """In float32, rounded once at the end."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total.to(terms[0].dtype)


def whole(*hosts: str) -> tuple[Replica, ...]:
    """One replica on each of the hosts."""
    return tuple(Replica(host, 0) for host in hosts)


def random_table(num_hosts: int, *, num_replicas: int = 1, num_slices: int = 1, seed: int = 0) -> RoutingTable:
    """Each unit of each layer on `num_replicas` random hosts."""
    draw = random.Random(seed)
    hosts = [f"host-{index}" for index in range(num_hosts)]
    return RoutingTable(
        epoch=1,
        replicas={
            (layer, expert): whole(*draw.sample(hosts, min(num_replicas, num_hosts)))
            for layer in range(NUM_LAYERS)
            for expert in range(NUM_EXPERTS * num_slices)
        },
        num_slices=num_slices,
    )


def held_by(table: RoutingTable, host: str) -> set[tuple[int, int]]:
    """What a table puts on a host."""
    return {pair for pair, replicas in table.replicas.items() if any(one.host == host for one in replicas)}


def random_batch(
    num_tokens: int, num_slots: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, experts_TK (distinct per token), scores_TK."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    experts_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :num_slots].contiguous()
    scores_TK = torch.rand(num_tokens, num_slots, generator=generator).to(dtype)
    return x_TD, experts_TK, scores_TK


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
        self.experts = {
            host: ScalingExperts(held_by(table, host), room=room, num_slices=table.num_slices) for host in table.hosts
        }
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
