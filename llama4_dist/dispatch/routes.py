"""The routing table as one attention worker sees it now: without lost hosts, with adopted experts, suspects last.

An expert whose last replica is lost is adopted: a live host maps it from the checkpoint when its first rows come. The
adopter follows from the names alone (rendezvous hashing), so workers that see the same hosts choose the same one. Where
experts are cut, each slice is an expert here (`units`): only the lost ones are adopted.
"""

import hashlib
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from torch import Tensor

from llama4_dist.dispatch.layout import (
    Groups,
    Indices,
    LayerView,
    Layout,
    NoReplicaError,
    lay_out,
    lay_out_tensor,
    view_layer,
)
from llama4_dist.dispatch.routing_table import Pair, Replica, RoutingTable
from llama4_dist.dispatch.suspects import Suspects
from llama4_dist.dispatch.units import name_of
from llama4_dist.errors import UnavailableError

Refused = AbstractSet[tuple[str, int]]  # (host, expert) that refused rows of one dispatch
NONE_REFUSED: Refused = frozenset()
WRONG_OWNER = "WRONG_OWNER"  # a host's reason for refusing rows of experts it does not hold


class Routes:
    """Where rows go. `published` is the table of the epoch, `live` the hosts with a link."""

    def __init__(self, published: RoutingTable, live: Iterable[str], suspects: Suspects) -> None:
        self.published = published
        self._live = set(live) & published.hosts
        self.suspects = suspects
        self.unmapped: set[tuple[str, int, int]] = set()  # (host, layer, expert) adopted, and not confirmed yet
        self._views: dict[int, LayerView] = {}
        self.table = published
        self.lose(published.hosts - self._live)

    def lay_out(self, layer: int, experts_N: Indices, refused: Refused = NONE_REFUSED) -> Layout:
        """Lay out copies; what no replica holds is adopted. UnavailableError when no host is left to do that."""
        while True:
            view = (None if refused else self._views.get(layer)) or self._view(layer, refused)
            try:
                return lay_out(view, experts_N)
            except NoReplicaError as error:
                refusers = {host for host, expert in refused if expert == error.expert}
                if not self._adopt([(layer, error.expert)], refusers):
                    raise self._unreachable(layer, error.expert) from None

    def lay_out_rows(self, layer: int, experts_TK: Tensor) -> Layout:
        """Lay out the copies of a router's choice."""
        view = self._views.get(layer)
        if view is not None:
            try:
                return lay_out_tensor(view, experts_TK)
            except NoReplicaError:
                pass  # it is adopted
        return self.lay_out(layer, experts_TK.cpu().numpy().reshape(-1))

    def lay_out_elsewhere(self, layer: int, experts_N: Indices, refused: Refused) -> Layout | None:
        """Lay out copies on replicas that exist, on slow hosts last; None where there are none."""
        view = self._view(layer, refused)
        try:
            return lay_out(view, experts_N)
        except NoReplicaError:
            return None

    def lose(self, hosts: AbstractSet[str]) -> None:
        """Take hosts out; give what only they held to adopters, all at once."""
        if not hosts:
            return
        self._live -= hosts
        for host in hosts:
            self.suspects.forget(host)
        self.table = self.table.without(*hosts)
        self._views.clear()
        self._adopt([pair for pair, replicas in self.table.replicas.items() if not replicas], frozenset())

    def miss(self, host: str, now_s: float) -> None:
        """Avoid a host for a while."""
        self.suspects.miss(host, now_s)
        self._views.clear()

    def expire(self, now_s: float) -> None:
        """Give suspects another chance whose time is up."""
        if self.suspects.expire(now_s):
            self._views.clear()

    def must_map(self, host: str, layer: int, groups: Groups) -> bool:
        """Tell whether a host has to map one of these experts first."""
        return any((host, layer, expert) in self.unmapped for expert, _ in groups)

    def confirm(self, host: str, layer: int, groups: Groups) -> None:
        """Note that a host has answered for these experts: it holds them."""
        self.unmapped -= {(host, layer, expert) for expert, _ in groups}

    def refuse(self, host: str, layer: int, experts: Iterable[int]) -> None:
        """Take back what a host could not adopt."""
        failed = {(layer, expert) for expert in experts if (host, layer, expert) in self.unmapped}
        self._take_out(host, failed)

    def stray(self, host: str, layer: int, experts: Iterable[int]) -> None:
        """Take a host out for experts that it no longer holds; those it is about to adopt again stay.

        A host lets go of what it adopted when a change ends, and of what an epoch does not give it before a late worker
        has heard of that epoch.
        """
        gone = {(layer, expert) for expert in experts if (host, layer, expert) not in self.unmapped}
        self._take_out(host, gone)

    def _take_out(self, host: str, pairs: AbstractSet[Pair]) -> None:
        if pairs:
            self.unmapped -= {(host, *pair) for pair in pairs}
            self.table = self.table.without_pairs(host, pairs)
            self._views.clear()

    def _view(self, layer: int, refused: Refused) -> LayerView:
        """Return a layer with the replicas chosen; kept as long as nothing changes and nobody refuses."""
        if refused:
            return self._choose(layer, refused)
        view = self._views.get(layer)
        if view is None:
            view = self._views[layer] = self._choose(layer, refused)
        return view

    def _choose(self, layer: int, refused: Refused) -> LayerView:
        replicas = self.table.by_layer.get(layer, {})
        return view_layer(replicas, excluded=refused, avoided=self.suspects.avoided)

    def _adopt(self, pairs: Iterable[Pair], refusers: AbstractSet[str]) -> bool:
        """Give each pair one more replica on a live host that has none and has not refused; tell if all got one."""
        extra: dict[Pair, Replica] = {}
        complete = True
        for pair in pairs:
            holders = {replica.host for replica in self.table.replicas.get(pair, ())}
            candidates = self._live - refusers - holders
            if not candidates or pair not in self.published.replicas:
                complete = False
                continue
            host = max(candidates - self.suspects.avoided or candidates, key=lambda name: _draw(name, *pair))
            extra[pair] = Replica(host, self.published.incarnations[host])
            self.unmapped.add((host, *pair))
        if extra:
            self.table = self.table.with_replicas(extra)
            self._views.clear()
        return complete

    def _unreachable(self, layer: int, unit: int) -> UnavailableError:
        name = name_of(unit, self.published.num_slices)
        return UnavailableError(
            f"no live host serves expert {name} of layer {layer}; retry when the cluster has recovered",
            reason="EXPERT_UNREACHABLE",
            metadata={"layer": str(layer), "expert": name},
        )


def _draw(host: str, layer: int, expert: int) -> bytes:
    return hashlib.blake2b(f"{host}/{layer}/{expert}".encode(), digest_size=8).digest()
