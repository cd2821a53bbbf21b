"""Gated feed-forward networks by the native pass: groups of rows through routed experts, or all rows through one."""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import byref
from functools import cache
from itertools import accumulate, groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.model.cpu.linears import read_linear
from llama4_dist.model.cpu.panels import NAME_OF, WEIGHT_NAME_OF, Panels
from llama4_dist.model.cpu.quantise import QuantisationError, quantise
from llama4_dist.model.weights import Weights
from llama4_dist.native import threads
from llama4_dist.native.bindings import FeedForwardShape, Groups, passes


class Network:
    """Weights of one network, D to F and back, where they lie: as stored in input-major rows, or packed."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, *, width: int, hidden: int, strides: tuple[int, int]):
        """`strides` are those between rows of gate and up, and of down; 0 = packed."""
        self.dtype = gate.dtype
        self.shape = (width, hidden, *strides)
        self.kind = (gate.dtype, *self.shape)  # what networks of one native pass have in common
        self.struct = FeedForwardShape(*self.shape)
        self.addresses = (gate.data_ptr(), up.data_ptr(), down.data_ptr())
        self._kept = (gate, up, down)

    @property
    def num_bytes(self) -> int:
        """The memory of the weights, without scales."""
        return sum(part.numel() * part.element_size() for part in self._kept)

    def reads(self, weight: Tensor) -> bool:
        """Tell whether the network reads this gate where it lies, and not a copy."""
        return self.addresses[0] == weight.data_ptr()


def network_of(weights: ExpertWeights, *, compact: bool = False) -> Network:
    """Return an expert's network; weights whose rows are not contiguous are copied, others stay where they are.

    With `compact` a slice that is cut across the rows of its expert is copied too: the kernel maps whole rows, other
    slices among them.
    """
    parts = (weights.gate_DF, weights.up_DF, weights.down_FD)
    stays = all(part.stride(1) == 1 for part in parts) and not (compact and weights.gate_up_D2F is None)
    gate, up, down = parts if stays else [part.contiguous() for part in parts]
    assert gate.stride() == up.stride(), "gate and up differ in layout"
    strides = (gate.stride(0), down.stride(0))
    return Network(gate, up, down, width=gate.shape[0], hidden=gate.shape[1], strides=strides)


def packed_network(gate: Panels, up: Panels, down: Panels) -> Network:
    """Return the network of three packed weights."""
    width, hidden = gate.num_inputs, gate.num_outputs
    return Network(gate.strips, up.strips, down.strips, width=width, hidden=hidden, strides=(0, 0))


def quantised_network(weights: ExpertWeights, error: QuantisationError) -> Network:
    """Return an expert's network in int8, which is a copy; `error` learns what was lost."""
    return packed_network(*[quantise(part, error) for part in (weights.gate_DF, weights.up_DF, weights.down_FD)])


def run_networks(networks: Sequence[Network], nums_rows: Sequence[int], x_RD: Tensor, out_RD: Tensor) -> None:
    """Write down(silu(gate x) · up x); the rows of the networks stand one after the other.

    Neighbours of one kind are one native pass: slices of an expert may differ in width, layers' experts in format.
    """
    assert x_RD.shape[0] == sum(nums_rows), "groups do not cover the rows"
    kind = networks[0].kind
    if all([network.kind == kind for network in networks]):  # noqa: C419 - a list is faster than a generator
        _run_alike(networks, nums_rows, x_RD, out_RD)
        return
    first = start = 0
    for _, alike in groupby(networks, key=attrgetter("kind")):
        last = first + len(list(alike))
        stop = start + sum(nums_rows[first:last])
        _run_alike(networks[first:last], nums_rows[first:last], x_RD[start:stop], out_RD[start:stop])
        first, start = last, stop


def _run_alike(networks: Sequence[Network], nums_rows: Sequence[int], x_RD: Tensor, out_RD: Tensor) -> None:
    """Do so for networks of one kind."""
    first_rows = [0, *accumulate(nums_rows)]
    first_rows.pop()
    num_networks = len(networks)
    gates, ups, downs = zip(*[network.addresses for network in networks], strict=True)
    table = array("q", (*first_rows, *nums_rows, *gates, *ups, *downs))  # five ctypes arrays take three times as long
    address, step = table.buffer_info()[0], num_networks * table.itemsize
    _run(networks[0], Groups(num_networks, *range(address, address + 5 * step, step)), x_RD, out_RD)


def _run(network: Network, groups: Groups, x_RD: Tensor, out_RD: Tensor) -> None:
    num_rows, width = x_RD.shape
    assert num_rows == out_RD.shape[0], "groups do not cover the rows"
    assert width == network.shape[0], "rows and weights do not fit"
    assert x_RD.stride(1) == 1, "rows are not contiguous"
    assert out_RD.is_contiguous(), "there is a gap between output rows"
    run = _passes(network.dtype, x_RD.dtype)
    x, stride, out = x_RD.data_ptr(), x_RD.stride(0), out_RD.data_ptr()
    run(byref(network.struct), byref(groups), x, stride, num_rows, out, threads.count())


@cache
def _passes(weights: torch.dtype, rows: torch.dtype) -> Any:
    return getattr(passes(), f"l4d_feed_forward_{WEIGHT_NAME_OF[weights]}_{NAME_OF[rows]}")


class FeedForward:
    """The network of a dense layer or the shared expert. Source: transformers `Llama4TextMLP`."""

    def __init__(self, prefix: str, weights: Weights) -> None:
        names = [f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")]
        self._network = packed_network(*[read_linear(weights, name) for name in names])
        # The call is made ready once, but for the number of rows.
        self._counts = (ctypes.c_int64 * 2)(0, 0)  # first row, number of rows
        self._places = (ctypes.c_void_p * 3)(*self._network.addresses)
        counts, places = ctypes.addressof(self._counts), ctypes.addressof(self._places)
        self._groups = Groups(1, counts, counts + 8, places, places + 8, places + 16)

    def __call__(self, x_TD: Tensor, out_TD: Tensor) -> None:
        """Write the network's output [T, D]; both are float32."""
        self._counts[1] = x_TD.shape[0]
        _run(self._network, self._groups, x_TD, out_TD)
