"""Gated feed-forward networks by the native pass: groups of rows through routed experts, or all rows through one."""

import ctypes
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.model.cpu.panels import NAME_OF, pack
from llama4_dist.model.weights import Weights
from llama4_dist.native.bindings import FeedForwardShape, Groups, passes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """Weights of one network, D to F and back, and where they lie: as stored in input-major rows, or packed."""

    width: int
    hidden: int
    strides: tuple[int, int]  # between rows of gate and up, and of down; 0 = packed
    gate: Tensor
    up: Tensor
    down: Tensor
    addresses: tuple[int, int, int]


def network_of(weights: ExpertWeights) -> Network:
    """Return an expert's network; weights whose rows are not contiguous are copied, others stay where they are."""
    parts = (weights.gate_DF, weights.up_DF, weights.down_FD)
    gate, up, down = parts if all(part.stride(1) == 1 for part in parts) else [part.contiguous() for part in parts]
    assert gate.stride() == up.stride(), "gate and up differ in layout"
    return Network(
        width=gate.shape[0],
        hidden=gate.shape[1],
        strides=(gate.stride(0), down.stride(0)),
        gate=gate,
        up=up,
        down=down,
        addresses=(gate.data_ptr(), up.data_ptr(), down.data_ptr()),
    )


def run_networks(networks: Sequence[Network], nums_rows: Sequence[int], x_RD: Tensor, out_RD: Tensor) -> None:
    """Write down(silu(gate x) · up x); the rows of the networks stand one after the other. All have one shape."""
    first = networks[0]
    num_rows, width = x_RD.shape
    assert num_rows == len(out_RD) == sum(nums_rows), "groups do not cover the rows"
    assert width == first.width, "rows and weights do not fit"
    assert x_RD.stride(1) == 1, "rows are not contiguous"
    assert out_RD.is_contiguous(), "there is a gap between output rows"
    assert all(n.strides == first.strides and n.hidden == first.hidden for n in networks), "networks differ in layout"
    gates, ups, downs = zip(*[network.addresses for network in networks], strict=True)
    first_rows, start = [], 0
    for count in nums_rows:
        first_rows.append(start)
        start += count
    addresses, counts = ctypes.c_void_p * len(networks), ctypes.c_int64 * len(networks)
    arrays = counts(*first_rows), counts(*nums_rows), addresses(*gates), addresses(*ups), addresses(*downs)
    groups = Groups(len(networks), *[ctypes.addressof(array) for array in arrays])
    run = getattr(passes(), f"l4d_feed_forward_{NAME_OF[first.gate.dtype]}_{NAME_OF[x_RD.dtype]}")
    run(
        byref(FeedForwardShape(first.width, first.hidden, *first.strides)),
        byref(groups),
        x_RD.data_ptr(),
        x_RD.stride(0),
        num_rows,
        out_RD.data_ptr(),
        torch.get_num_threads(),
    )


class FeedForward:
    """The network of a dense layer or the shared expert. Source: transformers `Llama4TextMLP`."""

    def __init__(self, prefix: str, weights: Weights) -> None:
        gate, up, down = (pack(weights.tensor(f"{prefix}.{name}_proj.weight")) for name in ("gate", "up", "down"))
        self._network = Network(
            width=gate.num_inputs,
            hidden=gate.num_outputs,
            strides=(0, 0),
            gate=gate.strips,
            up=up.strips,
            down=down.strips,
            addresses=(gate.address, up.address, down.address),
        )

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the network's output [T, D]; x is float32."""
        out_TD = torch.empty_like(x_TD)
        run_networks((self._network,), (len(x_TD),), x_TD, out_TD)
        return out_TD
