"""The routed experts of one host: a stateless function of (layer, expert, rows)."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.model.activation import swiglu
from llama4_dist.model.cpu.feed_forward import Network, run_networks
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.held_expert import AnyWeights, ExpandedExpert, ExpertForms, HeldExpert, Pair
from llama4_dist.model.linear import linear
from llama4_dist.model.quantised_expert import apply_quantised_expert
from llama4_dist.model.weight_format import STORED, check_weight_format

EXPANDED_BYTES = 2 << 30  # of experts that native passes multiply in float32, whatever the number of those held


class Experts:
    """Holds weights by (layer, expert) and applies them to rows. Weights already in `dtype` on `device` are not copied.

    `width` is the model's width D. An expert is copied when its first rows come: with `weight_format` int8 into that,
    otherwise if its rows are not contiguous, or with `compact` are cut. `on_copied` is told that what was put is not
    read any more; `quantisation_error` says what was lost so far. Experts that are stored quantised are multiplied as
    such; where groups of inputs have scales, native passes expand them, and keep `expanded_bytes` of those. Raises
    ConfigError where the format cannot be computed.
    """

    def __init__(
        self,
        weights: Mapping[Pair, AnyWeights],
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        weight_format: str = STORED,
        compact: bool = False,
        on_copied: Callable[[Pair], None] = lambda pair: None,
        expanded_bytes: int = EXPANDED_BYTES,
    ) -> None:
        check_weight_format(weight_format, dtype=dtype, device=device)
        self.weight_format = weight_format
        self.width = width
        self.dtype = dtype
        self.device = torch.device(device)
        self._is_native = is_native(dtype, device)
        self._forms = ExpertForms(
            dtype=dtype,
            device=self.device,
            weight_format=weight_format,
            compact=compact,
            on_copied=on_copied,
            expanded_bytes=expanded_bytes,
        )
        self.quantisation_error = self._forms.quantisation_error
        self._all_stay = True  # no network is made again and again: those of a call run together
        self._held: dict[Pair, HeldExpert] = {}
        self.holds: frozenset[Pair] = frozenset()
        self.put(weights)

    @property
    def bytes_expanded(self) -> int:
        """What the expanded experts take now."""
        return self._forms.expanded.num_bytes

    def put(self, weights: Mapping[Pair, AnyWeights]) -> None:
        """Hold more experts; rows of others may be computed meanwhile, in another thread."""
        held = {pair: self._forms.hold(pair, value) for pair, value in weights.items()}
        self._all_stay = self._all_stay and not any(isinstance(one, ExpandedExpert) for one in held.values())
        self._held = {**self._held, **held}
        self.holds = frozenset(self._held)

    def drop(self, pairs: Collection[Pair]) -> None:
        """Hold these no longer. Rows that are being computed end well: they have the weights in hand."""
        self.holds -= frozenset(pairs)
        for pair in pairs:
            self.cool(pair)
        self._held = {key: value for key, value in self._held.items() if key in self.holds}

    def cool(self, pair: Pair) -> None:
        """Let go of a held expert's copy, if there is one; the next rows make it anew."""
        held = self._held.get(pair)
        if held is not None:
            held.cool()

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
            if present and self._all_stay:
                networks = [held.network for held, _ in present]
                run_networks(networks, [num_rows for _, num_rows in present], x_RD, out_RD)
            elif present:
                run_in_turns(present, x_RD, out_RD)
            return
        with torch.inference_mode():
            x_RD = x_RD.to(self.device)  # where they came by a socket they lie on the host
            start = 0
            for expert, num_rows in groups:
                stop = start + num_rows
                if num_rows:
                    apply(x_RD[start:stop], self._held[layer, expert].weights, out_RD[start:stop])
                start = stop


def run_in_turns(present: Sequence[tuple[HeldExpert, int]], x_RD: Tensor, out_RD: Tensor) -> None:
    """Run experts, each with its number of rows; of those that are expanded no more at once than may stay in memory."""
    start = stop = num_bytes = 0
    networks: list[Network] = []
    nums_rows: list[int] = []
    for held, num_rows in present:
        network = held.network
        if networks and num_bytes + network.num_bytes > held.room:
            run_networks(networks, nums_rows, x_RD[start:stop], out_RD[start:stop])
            start, num_bytes, networks, nums_rows = stop, 0, [], []
        networks.append(network)
        nums_rows.append(num_rows)
        num_bytes += network.num_bytes
        stop += num_rows
    run_networks(networks, nums_rows, x_RD[start:stop], out_RD[start:stop])


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
