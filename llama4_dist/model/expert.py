"""The routed experts of one host: a stateless function of (layer, expert, rows)."""

import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.model.activation import swiglu
from llama4_dist.model.cpu.expanded import ExpandedExperts
from llama4_dist.model.cpu.feed_forward import Network, network_of, quantised_network, run_networks
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.cpu.quantise import QuantisationError
from llama4_dist.model.cpu.quantised import is_multiplied_as_stored, stored_network
from llama4_dist.model.linear import linear
from llama4_dist.model.quantised_expert import apply_quantised_expert
from llama4_dist.model.weight_format import INT8, STORED, check_stored_format, check_weight_format

log = logging.getLogger(__name__)

Pair = tuple[int, int]  # (layer, expert)
AnyWeights = ExpertWeights | QuantisedExpertWeights
EXPANDED_BYTES = 2 << 30  # of experts that native passes multiply in float32, whatever the number of those held


class Experts:
    """Holds weights by (layer, expert) and applies them to rows. Weights already in `dtype` on `device` are not copied.

    `width` is the model's width D. With `weight_format` int8 an expert is copied into int8 when its first rows come,
    and `on_copied` is told that what was put is not read any more; `quantisation_error` says what was lost so far.
    Experts that are stored quantised are multiplied as such; where groups of inputs have scales, native passes expand
    them, and keep `expanded_bytes` of those. Raises ConfigError where the format cannot be computed.
    """

    def __init__(
        self,
        weights: Mapping[Pair, AnyWeights],
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        weight_format: str = STORED,
        on_copied: Callable[[Pair], None] = lambda pair: None,
        expanded_bytes: int = EXPANDED_BYTES,
    ) -> None:
        check_weight_format(weight_format, dtype=dtype, device=device)
        self.weight_format = weight_format
        self.quantisation_error = QuantisationError()
        self._on_copied = on_copied
        self.width = width
        self.dtype = dtype
        self.device = torch.device(device)
        self._is_native = is_native(dtype, device)
        self._expanded = ExpandedExperts(expanded_bytes)
        self._are_alike = True  # no expert is of a kind of its own: those of a call run together
        self._held: dict[Pair, HeldExpert] = {}
        self.holds: frozenset[Pair] = frozenset()
        self.put(weights)

    def put(self, weights: Mapping[Pair, AnyWeights]) -> None:
        """Hold more experts; rows of others may be computed meanwhile, in another thread."""
        held = {pair: self._hold(pair, value) for pair, value in weights.items()}
        self._held = {**self._held, **held}
        self.holds = frozenset(self._held)

    def _hold(self, pair: Pair, weights: AnyWeights) -> "HeldExpert":
        if isinstance(weights, QuantisedExpertWeights):
            check_stored_format(self.weight_format, weights.scheme)
            self._are_alike = False
            if self._is_native and is_multiplied_as_stored(weights.scheme):
                return HeldExpert(weights, partial(self._packed, pair))
            return ExpandedExpert(weights.to(self.device), self._expanded)
        if self.weight_format == INT8:
            return HeldExpert(weights, partial(self._quantised, pair))
        return HeldExpert(_moved(weights, self.dtype, self.device), network_of)

    def drop(self, pairs: Collection[Pair]) -> None:
        """Hold these no longer. Rows that are being computed end well: they have the weights in hand."""
        self.holds -= frozenset(pairs)
        for pair in pairs:
            dropped = self._held.get(pair)
            if isinstance(dropped, ExpandedExpert):
                self._expanded.forget(dropped.weights)
        self._held = {key: value for key, value in self._held.items() if key in self.holds}

    def weights(self, layer: int, expert: int) -> AnyWeights:
        """Return the weights of a held expert, as they are multiplied; those that int8 ones are made from."""
        weights: AnyWeights = self._held[layer, expert].weights
        return weights

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        """Write the outputs of `x_RD` into `out_RD`; `groups` are (expert, number of rows), one after the other.

        Rows come already multiplied by the router's score: Llama 4 scales what an expert reads.
        """
        covered = sum([num_rows for _, num_rows in groups])
        assert covered == len(x_RD) == len(out_RD), "groups do not cover the rows"
        if self._is_native:
            present = [(self._held[layer, expert], num_rows) for expert, num_rows in groups if num_rows]
            if present and self._are_alike:
                networks = [held.network for held, _ in present]
                run_networks(networks, [num_rows for _, num_rows in present], x_RD, out_RD)
            elif present:
                self._run_in_turns(present, x_RD, out_RD)
            return
        with torch.inference_mode():
            x_RD = x_RD.to(self.device)  # where they came by a socket they lie on the host
            start = 0
            for expert, num_rows in groups:
                stop = start + num_rows
                if num_rows:
                    apply(x_RD[start:stop], self._held[layer, expert].weights, out_RD[start:stop])
                start = stop

    def _run_in_turns(self, present: "Sequence[tuple[HeldExpert, int]]", x_RD: Tensor, out_RD: Tensor) -> None:
        """Run experts of one kind together, and of expanded ones no more than stay in memory."""
        start = stop = 0
        networks: list[Network] = []
        nums_rows: list[int] = []
        for held, num_rows in present:
            network = held.network
            if networks and (network.kind != networks[0].kind or len(networks) >= held.num_together(network)):
                run_networks(networks, nums_rows, x_RD[start:stop], out_RD[start:stop])
                start, networks, nums_rows = stop, [], []
            networks.append(network)
            nums_rows.append(num_rows)
            stop += num_rows
        run_networks(networks, nums_rows, x_RD[start:stop], out_RD[start:stop])

    def _packed(self, pair: Pair, weights: QuantisedExpertWeights) -> Network:
        """Return an expert of the numbers stored. Two threads may make it at once: both are the same."""
        network = stored_network(weights)
        self._on_copied(pair)
        return network

    def _quantised(self, pair: Pair, weights: ExpertWeights) -> Network:
        """Return an expert in int8. Two threads may make it at once: both are the same, and one is dropped."""
        network = quantised_network(weights, self.quantisation_error)
        self._on_copied(pair)
        log.debug("expert_quantised layer=%d expert=%d so_far: %s", *pair, self.quantisation_error)
        return network


@dataclass(frozen=True, eq=False)
class HeldExpert:
    """An expert's weights, and from its first rows on the same for the native pass: mapping alone takes no memory."""

    weights: Any
    make: Callable[[Any], Network]

    @cached_property
    def network(self) -> Network:
        return self.make(self.weights)

    def num_together(self, network: Network) -> int:
        """Return how many may be in memory at once."""
        return sys.maxsize


class ExpandedExpert(HeldExpert):
    """An expert whose network is kept elsewhere, and not for ever."""

    make: ExpandedExperts

    @property
    def network(self) -> Network:
        return self.make(self.weights)

    def num_together(self, network: Network) -> int:
        return self.make.num_together(network)


def apply(x_RD: Tensor, weights: AnyWeights, out_RD: Tensor) -> None:
    """Write an expert's outputs by torch, whatever its format."""
    if isinstance(weights, QuantisedExpertWeights):
        apply_quantised_expert(x_RD, weights, out_RD)
    else:
        apply_expert(x_RD, weights, out_RD)


def apply_expert(x_RD: Tensor, weights: ExpertWeights, out_RD: Tensor) -> None:
    """Write down(silu(gate x) · up x)."""
    if weights.gate_up_D2F is not None:
        gate_RF, up_RF = linear(x_RD, weights.gate_up_D2F.T).chunk(2, dim=-1)
    else:
        gate_RF, up_RF = linear(x_RD, weights.gate_DF.T), linear(x_RD, weights.up_DF.T)
    out_RD.copy_(linear(swiglu(gate_RF, up_RF), weights.down_FD.T))


def _moved(weights: ExpertWeights, dtype: torch.dtype, device: torch.device | str) -> ExpertWeights:
    """Return the weights in `dtype` on `device`; gate and up remain views of the one matrix where there is one."""
    moved = {f.name: getattr(weights, f.name) for f in fields(weights)}
    moved = {name: None if t is None else t.to(device=device, dtype=dtype) for name, t in moved.items()}
    if moved["gate_up_D2F"] is not None:
        moved["gate_DF"], moved["up_DF"] = moved["gate_up_D2F"].chunk(2, dim=-1)
    return ExpertWeights(**moved)
