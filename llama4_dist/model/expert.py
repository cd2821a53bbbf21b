"""The routed experts of one host: a stateless function of (layer, expert, rows)."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.model.activation import swiglu
from llama4_dist.model.cpu.feed_forward import Network, network_of, quantised_network, run_networks
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.cpu.quantise import QuantisationError
from llama4_dist.model.linear import linear
from llama4_dist.model.weight_format import INT8, STORED, check_weight_format

log = logging.getLogger(__name__)

Pair = tuple[int, int]  # (layer, expert); where experts are cut, a slice of one is an expert here


class Experts:
    """Holds weights by (layer, expert) and applies them to rows. Weights already in `dtype` on `device` are not copied.

    `width` is the model's width D. An expert is copied when its first rows come: with `weight_format` int8 into that,
    otherwise if its rows are not contiguous, or with `compact` are cut. `on_copied` is told that what was put is not
    read any more; `quantisation_error` says what was lost so far. Raises ConfigError where the format cannot be
    computed.
    """

    def __init__(
        self,
        weights: Mapping[Pair, ExpertWeights],
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        weight_format: str = STORED,
        compact: bool = False,
        on_copied: Callable[[Pair], None] = lambda pair: None,
    ) -> None:
        check_weight_format(weight_format, dtype=dtype, device=device)
        self.weight_format = weight_format
        self.quantisation_error = QuantisationError()
        self._compact, self._on_copied = compact, on_copied
        self.width = width
        self.dtype = dtype
        self.device = torch.device(device)
        self._is_native = is_native(dtype, device)
        self._held: dict[Pair, HeldExpert] = {}
        self.holds: frozenset[Pair] = frozenset()
        self.put(weights)

    def put(self, weights: Mapping[Pair, ExpertWeights]) -> None:
        """Hold more experts; rows of others may be computed meanwhile, in another thread."""
        if self.weight_format == INT8:
            held = {pair: HeldExpert(value, partial(self._quantised, pair)) for pair, value in weights.items()}
        else:
            moved = {pair: _moved(value, self.dtype, self.device) for pair, value in weights.items()}
            held = {pair: HeldExpert(value, partial(self._as_stored, pair)) for pair, value in moved.items()}
        self._held = {**self._held, **held}
        self.holds = frozenset(self._held)

    def drop(self, pairs: Collection[Pair]) -> None:
        """Hold these no longer. Rows that are being computed end well: they have the weights in hand."""
        self.holds -= frozenset(pairs)
        self._held = {key: value for key, value in self._held.items() if key in self.holds}

    def cool(self, pair: Pair) -> None:
        """Let go of a held expert's copy, if there is one; the next rows make it anew."""
        held = self._held.get(pair)
        if held is not None:
            held.cool()

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return the weights of a held expert, as they are multiplied; those that int8 ones are made from."""
        return self._held[layer, expert].weights

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        """Write the outputs of `x_RD` into `out_RD`; `groups` are (expert, number of rows), one after the other.

        Rows come already multiplied by the router's score: Llama 4 scales what an expert reads.
        """
        covered = sum([num_rows for _, num_rows in groups])
        assert covered == len(x_RD) == len(out_RD), "groups do not cover the rows"
        if self._is_native:
            present = [(self._held[layer, expert].network, num_rows) for expert, num_rows in groups if num_rows]
            if present:
                run_networks([network for network, _ in present], [num_rows for _, num_rows in present], x_RD, out_RD)
            return
        with torch.inference_mode():
            x_RD = x_RD.to(self.device)  # where they came by a socket they lie on the host
            start = 0
            for expert, num_rows in groups:
                stop = start + num_rows
                if num_rows:
                    apply_expert(x_RD[start:stop], self._held[layer, expert].weights, out_RD[start:stop])
                start = stop

    def _as_stored(self, pair: Pair, weights: ExpertWeights) -> Network:
        network = network_of(weights, compact=self._compact)
        if not network.reads(weights.gate_DF):
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

    weights: ExpertWeights
    make: Callable[[ExpertWeights], Network]

    @cached_property
    def network(self) -> Network:
        return self.make(self.weights)

    def cool(self) -> None:
        """Forget the network; whoever computes with it has it in hand."""
        self.__dict__.pop("network", None)


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
