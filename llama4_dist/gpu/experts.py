"""The routed experts of one host on a CUDA device: `model.expert.Experts` by Triton's kernels.

Rows come from sockets and memory that processes share, so from the host: they go to the device in one copy through
page-locked memory, with the list of their experts in front, and come back in another.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.gpu.addressed import AddressedGroups, multiply_addressed
from llama4_dist.gpu.pinned import PinnedMemory, wait_for
from llama4_dist.gpu.stream_linear import MAX_ROWS
from llama4_dist.model.weight_format import STORED

Pair = tuple[int, int]  # (layer, expert)

ALIGNMENT = 128  # bytes: of the rows behind the list, for tensor maps
ENTRY_ALIGNMENT = 16  # bytes: of the parts of the list; a kernel is compiled anew for pointers that are aligned less
ROWS_TOGETHER = 16  # row counts are rounded up to it, for the same reason
MIN_GROUPS = 16  # of a launch for many rows, again for the same


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceExpert:
    """One expert as the kernels read it: [2F, D], gate's rows before up's, and [D, F]; both dense."""

    gate_up: Tensor
    down: Tensor


class GpuExperts:
    """Holds weights by (layer, expert) on a device, each expert in memory of its own, and applies them to rows.

    A row's bits do not depend on the rows or the experts computed with it. `expert_width` is F, the most that any has:
    narrower slices are filled up with columns of zeros, which add nothing. `num_experts` bounds those of a layer.
    """

    def __init__(
        self, *, width: int, expert_width: int, num_experts: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.weight_format = STORED
        self.width = width
        self.dtype = dtype
        self.device = torch.device(device)
        self.holds: frozenset[Pair] = frozenset()
        self._expert_width = expert_width
        self._num_experts = num_experts
        self._held: dict[Pair, DeviceExpert] = {}
        self._outgoing, self._incoming = PinnedMemory(self.device), PinnedMemory(self.device)
        self._computing = threading.Lock()  # fingerprints are made beside the thread that serves
        self._is_warm = self.device.type != "cuda"

    def put(self, weights: Mapping[Pair, ExpertWeights | QuantisedExpertWeights]) -> None:
        """Copy more experts to the device; rows of others may be computed meanwhile, in another thread.

        Quantised ones become their values in `dtype`: weights that lie apart have no kernel with scales yet.
        """
        if not self._is_warm:
            self._warm_up()
        self._held = {**self._held, **{pair: self._moved(value) for pair, value in weights.items()}}
        self.holds = frozenset(self._held)

    def drop(self, pairs: Collection[Pair]) -> None:
        """Hold these no longer. Rows that are being computed end well: their launches come before any new use."""
        self.holds -= frozenset(pairs)
        self._held = {key: value for key, value in self._held.items() if key in self.holds}

    def cool(self, pair: Pair) -> None:
        """Do nothing: what is multiplied is all there is, and stays on the device."""

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return the weights of a held expert as views of what is multiplied, on the device."""
        held = self._held[layer, expert]
        gate_FD, up_FD = held.gate_up.chunk(2)
        return ExpertWeights(gate_DF=gate_FD.T, up_DF=up_FD.T, down_FD=held.down.T)

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        """Write the outputs of `x_RD` into `out_RD`; `groups` are (expert, number of rows), one after the other.

        Both may lie on the host or on the device. Returns when `out_RD` is written.
        """
        covered = sum([num_rows for _, num_rows in groups])
        assert covered == len(x_RD) == len(out_RD), "groups do not cover the rows"
        present = [(self._held[layer, expert], num_rows) for expert, num_rows in groups if num_rows]
        if present:
            self._compute(present, x_RD, out_RD)

    def _compute(self, present: Sequence[tuple[DeviceExpert, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        with self._computing:
            on_device_RD, groups = self._sent(present, x_RD)
            inner_RF = multiply_addressed(
                on_device_RD, groups.gate_up, groups, num_columns=self._expert_width, gated=True
            )
            y_RD = multiply_addressed(inner_RF, groups.down, groups, num_columns=self.width)[: len(out_RD)]
            if out_RD.device.type == "cpu":
                back_RD = self._incoming.rows(len(out_RD), self.width, self.dtype)
                back_RD.copy_(y_RD, non_blocking=True)
                wait_for(self.device)
                out_RD.copy_(back_RD)
            else:
                out_RD.copy_(y_RD)
                wait_for(self.device)

    def _sent(self, present: Sequence[tuple[DeviceExpert, int]], x_RD: Tensor) -> tuple[Tensor, AddressedGroups]:
        """Return the rows, filled up to a multiple of ROWS_TOGETHER, and their groups, both on the device."""
        table = GroupTable(present)
        num_rows = -(-len(x_RD) // ROWS_TOGETHER) * ROWS_TOGETHER
        row_bytes = self.width * self.dtype.itemsize
        comes_from_host = x_RD.device.type == "cpu"
        host = self._outgoing.take(table.num_bytes + (num_rows * row_bytes if comes_from_host else 0))
        table.write(host.numpy())
        if not comes_from_host:
            return x_RD, table.groups(host.to(self.device))
        rows = host[table.num_bytes : table.num_bytes + len(x_RD) * row_bytes]
        rows.view(self.dtype).view(x_RD.shape).copy_(x_RD)
        memory = host.to(self.device, non_blocking=True)
        return memory[table.num_bytes :].view(self.dtype).view(num_rows, self.width), table.groups(memory)

    def _moved(self, weights: ExpertWeights | QuantisedExpertWeights) -> DeviceExpert:
        """Copy an expert to the device, where it is turned if it is stored input-major."""
        if isinstance(weights, QuantisedExpertWeights):
            gate_FD, up_FD, down_DF = (linear.to(self.device).dequantise(self.dtype) for linear in weights.linears())
            weights = ExpertWeights(gate_DF=gate_FD.T, up_DF=up_FD.T, down_FD=down_DF.T)
        width, inner = self.width, self._expert_width
        own = weights.down_FD.shape[0]
        new = torch.empty if own == inner else torch.zeros
        gate_up = new((2 * inner, width), dtype=self.dtype, device=self.device)
        gate_up[:own] = weights.gate_DF.to(device=self.device, dtype=self.dtype).T
        gate_up[inner : inner + own] = weights.up_DF.to(device=self.device, dtype=self.dtype).T
        down = new((width, inner), dtype=self.dtype, device=self.device)
        down[:, :own] = weights.down_FD.to(device=self.device, dtype=self.dtype).T
        return DeviceExpert(gate_up=gate_up, down=down)

    def _warm_up(self) -> None:
        """Have all that calls launch compiled now: a worker gives up a host that needs a second for an answer."""
        gate_up = torch.zeros((2 * self._expert_width, self.width), dtype=self.dtype, device=self.device)
        down = torch.zeros((self.width, self._expert_width), dtype=self.dtype, device=self.device)
        expert = DeviceExpert(gate_up=gate_up, down=down)
        for power in range((self._num_experts - 1).bit_length() + 1):  # kernels differ by powers of two of groups
            num_groups = 1 << power
            for num_rows in (1, MAX_ROWS // 2, MAX_ROWS, MAX_ROWS + 1):
                groups = [(expert, num_rows)] + [(expert, 1)] * (num_groups - 1)
                x_RD = torch.zeros((num_rows + num_groups - 1, self.width), dtype=self.dtype)
                self._compute(groups, x_RD, torch.empty_like(x_RD))
        self._is_warm = True


class GroupTable:
    """The list in front of the rows: where each group's weights lie, where its rows begin. All integers, one memory."""

    def __init__(self, present: Sequence[tuple[DeviceExpert, int]]) -> None:
        nums_rows = [num_rows for _, num_rows in present]
        self.max_rows = max(nums_rows)
        self.num_groups = len(present)
        if self.max_rows > MAX_ROWS:
            self.num_groups = max(MIN_GROUPS, triton.next_power_of_2(len(present)))
        fill = self.num_groups - len(present)  # groups without rows, whose weights nobody reads
        starts = np.concatenate([[0], np.cumsum(nums_rows), np.full(fill, sum(nums_rows))])
        self._parts: tuple[NDArray[np.integer], ...] = (
            starts.astype(np.int32),
            np.arange(self.num_groups, dtype=np.int32),
            np.array([expert.gate_up.data_ptr() for expert, _ in present] + [0] * fill, dtype=np.int64),
            np.array([expert.down.data_ptr() for expert, _ in present] + [0] * fill, dtype=np.int64),
        )
        self._offsets = [0]
        for part in self._parts:
            self._offsets.append(self._offsets[-1] + _rounded(part.nbytes, ENTRY_ALIGNMENT))
        self.num_bytes = _rounded(self._offsets[-1], ALIGNMENT)

    def write(self, memory: NDArray[np.uint8]) -> None:
        """Write it to the beginning of `memory`."""
        for offset, part in zip(self._offsets, self._parts, strict=False):
            memory[offset : offset + part.nbytes] = part.view(np.uint8)

    def groups(self, memory: Tensor) -> AddressedGroups:
        """Return what lies in a copy of that memory."""
        starts, numbers, gate_up, down = (
            memory[offset : offset + part.nbytes].view(torch.int32 if part.itemsize == 4 else torch.int64)
            for offset, part in zip(self._offsets, self._parts, strict=False)
        )
        return AddressedGroups(
            num_groups=self.num_groups,
            max_rows=self.max_rows,
            starts=starts,
            numbers=numbers,
            gate_up=gate_up,
            down=down,
        )


def _rounded(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
