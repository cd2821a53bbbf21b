"""An expert that is held, in one of its forms: as stored, copied into int8 or packed numbers, or expanded for a while.

Mapping an expert takes no memory: what is multiplied is made when its first rows come.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.model.cpu.expanded import ExpandedExperts
from llama4_dist.model.cpu.feed_forward import Network, network_of, quantised_network
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.cpu.quantise import QuantisationError
from llama4_dist.model.cpu.quantised import expanded_network, is_multiplied_as_stored, stored_network
from llama4_dist.model.weight_format import INT8, check_stored_format

log = logging.getLogger(__name__)

Pair = tuple[int, int]  # (layer, expert); where experts are cut, a slice of one is an expert here
AnyWeights = ExpertWeights | QuantisedExpertWeights


@dataclass(frozen=True, eq=False)
class HeldExpert:
    """An expert's weights, and from its first rows on the same for the native pass."""

    weights: Any
    make: Callable[[Any], Network]

    @cached_property
    def network(self) -> Network:
        return self.make(self.weights)

    @property
    def room(self) -> int:
        """The bytes of networks that may be in memory together with this one."""
        return sys.maxsize

    def cool(self) -> None:
        """Forget the network; whoever computes with it has it in hand."""
        self.__dict__.pop("network", None)


@dataclass(frozen=True, eq=False)
class ExpandedExpert(HeldExpert):
    """An expert whose network is kept among others', and not for ever."""

    kept: ExpandedExperts

    @property
    def network(self) -> Network:
        return self.kept(self.weights, self.make)

    @property
    def room(self) -> int:
        return self.kept.capacity_bytes

    def cool(self) -> None:
        self.kept.forget(self.weights)


class ExpertForms:
    """Chooses the form of each expert that is held; see `Experts` for what the arguments mean."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weight_format: str,
        compact: bool,
        on_copied: Callable[[Pair], None],
        expanded_bytes: int,
    ) -> None:
        self._dtype, self._device, self._weight_format = dtype, device, weight_format
        self._compact, self._on_copied = compact, on_copied
        self._is_native = is_native(dtype, device)
        self.quantisation_error = QuantisationError()
        self.expanded = ExpandedExperts(expanded_bytes)

    def hold(self, pair: Pair, weights: AnyWeights) -> HeldExpert:
        """Return an expert to be held; ConfigError for weights that are quantised and would be once more.

        Two threads may make its network at once: both are the same, and one is dropped.
        """
        if isinstance(weights, QuantisedExpertWeights):
            check_stored_format(self._weight_format, weights.scheme)
            if self._is_native and not is_multiplied_as_stored(weights.scheme):
                return ExpandedExpert(weights, partial(self._expanded, pair), self.expanded)
            return HeldExpert(weights.to(self._device), partial(self._packed, pair))
        if self._weight_format == INT8:
            return HeldExpert(weights, partial(self._quantised, pair))
        return HeldExpert(_moved(weights, self._dtype, self._device), partial(self._as_stored, pair))

    def _as_stored(self, pair: Pair, weights: ExpertWeights) -> Network:
        network = network_of(weights, compact=self._compact)
        if not network.reads(weights.gate_DF):
            self._on_copied(pair)
        return network

    def _quantised(self, pair: Pair, weights: ExpertWeights) -> Network:
        network = quantised_network(weights, self.quantisation_error)
        self._on_copied(pair)
        log.debug("expert_quantised layer=%d expert=%d so_far: %s", *pair, self.quantisation_error)
        return network

    def _packed(self, pair: Pair, weights: QuantisedExpertWeights) -> Network:
        network = stored_network(weights)
        self._on_copied(pair)
        return network

    def _expanded(self, pair: Pair, weights: QuantisedExpertWeights) -> Network:
        network = expanded_network(weights)
        if self._compact:  # otherwise it may soon be made again, of what is mapped
            self._on_copied(pair)
        return network


def _moved(weights: ExpertWeights, dtype: torch.dtype, device: torch.device) -> ExpertWeights:
    """Return the weights in `dtype` on `device`; gate and up remain views of the one matrix where there is one."""
    moved = {f.name: getattr(weights, f.name) for f in fields(weights)}
    moved = {name: None if t is None else t.to(device=device, dtype=dtype) for name, t in moved.items()}
    if moved["gate_up_D2F"] is not None:
        moved["gate_DF"], moved["up_DF"] = moved["gate_up_D2F"].chunk(2, dim=-1)
    return ExpertWeights(**moved)
