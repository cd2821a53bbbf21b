"""Keeps the experts that were expanded to float32 last, within a bound; others are made again when asked for."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.model.cpu.feed_forward import Network


class ExpandedExperts:
    """Networks by what they are made of, least recently used dropped first. One is kept whatever the bound."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._networks: OrderedDict[int, tuple[QuantisedExpertWeights, Network]] = OrderedDict()
        self._changing = threading.Lock()

    def __call__(self, weights: QuantisedExpertWeights, make: Callable[[QuantisedExpertWeights], Network]) -> Network:
        """Return the network of `weights`, made now or before."""
        key = id(weights)  # the weights are kept beside their network, so that no others get that id
        with self._changing:
            if key in self._networks:
                self._networks.move_to_end(key)
                return self._networks[key][1]
            network = make(weights)
            self._make_room(network.num_bytes)
            self._networks[key] = (weights, network)
            self.num_bytes += network.num_bytes
            return network

    def forget(self, weights: QuantisedExpertWeights) -> None:
        """Give back the memory of an expert that is not held any more, or not in memory."""
        with self._changing:
            _, network = self._networks.pop(id(weights), (None, None))
            self.num_bytes -= network.num_bytes if network else 0

    def _make_room(self, num_bytes: int) -> None:
        while self._networks and self.num_bytes + num_bytes > self.capacity_bytes:
            _, (_, dropped) = self._networks.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
