"""The experts of one host, mapped from its checkpoint: they come and go while others compute. Knows no network.

Weights are read-only views of the mapped file wherever dtype and device allow, so that a host serves before its pages
are warm, and a killed one is gone at once. In int8 an expert takes memory of its own from its first rows on, and gives
back what was mapped. A host may hold more than its memory takes (`residency`).
"""

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.frame import payload_of
from llama4_dist.errors import UnavailableError
from llama4_dist.model.expert import EXPANDED_BYTES, Experts
from llama4_dist.model.expert_cut import ExpertCut
from llama4_dist.model.held_expert import AnyWeights, Pair
from llama4_dist.model.residency import Residency, check_residency
from llama4_dist.model.weight_format import INT8, STORED

NUM_GOLDEN_ROWS = 4
KERNEL_MAPS = 2 * 1024 * 1024  # bytes of a file that Linux maps at once at most, where one is touched


class RoutedExperts(Protocol):
    """What a store asks of whoever computes; `model.expert.Experts` documents it, `gpu.experts.GpuExperts` has it."""

    weight_format: str
    width: int
    dtype: torch.dtype
    device: torch.device
    holds: frozenset[Pair]

    def put(self, weights: Mapping[Pair, AnyWeights]) -> None: ...

    def drop(self, pairs: Collection[Pair]) -> None: ...

    def cool(self, pair: Pair) -> None: ...

    def weights(self, layer: int, expert: int) -> AnyWeights: ...

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None: ...


class ExpertStore:
    """Satisfies `dispatch.ExpertCompute`. One thread computes, any may add and remove.

    Every expert is cut into `num_slices`; what is held is (layer, unit), see `dispatch.units`. `capacity_bytes` bounds
    the weights held, `residency_bytes` those of them that stay in memory: the others are read again when their rows
    come, and what is copied or expanded counts as what that takes. None = no bound. `experts`, which hold none yet,
    compute in place of `model.expert.Experts`. Raises ConfigError for a cut or a bound that cannot be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        weight_format: str = STORED,
        num_slices: int = 1,
        capacity_bytes: int | None = None,
        residency_bytes: int | None = None,
        experts: RoutedExperts | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._cut = ExpertCut.of(
            checkpoint, dtype=dtype, device=device, weight_format=weight_format, num_slices=num_slices
        )
        # A copy is all that is read from its making on: what it was made of need not stay mapped.
        self._reads_copies = weight_format == INT8 or checkpoint.scheme is not None
        self._experts: RoutedExperts = experts or Experts(
            {},
            width=checkpoint.config.hidden_size,
            dtype=dtype,
            device=device,
            weight_format=weight_format,
            compact=residency_bytes is not None,
            on_copied=self._copied,
            expanded_bytes=EXPANDED_BYTES if residency_bytes is None else residency_bytes,
        )
        self.residency: Residency | None = None
        if residency_bytes is not None:
            check_residency(residency_bytes, checkpoint, dtype=dtype, device=device, weight_format=weight_format)
            self.residency = Residency(
                residency_bytes, bytes_of=self._computed_bytes_of, read_ahead=self._read_ahead, let_go=self._let_go
            )
        self._capacity_bytes = capacity_bytes
        self._changing = threading.Lock()
        self._adopted: set[Pair] = set()
        self._fingerprints: dict[Pair, str] = {}

    @property
    def holds(self) -> frozenset[Pair]:
        """The (layer, unit) pairs that are here."""
        return self._experts.holds

    @property
    def bytes_held(self) -> int:
        return sum(map(self._bytes_of, self.holds))

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        """Compute rows; see `Experts`."""
        if self.residency is None:
            self._experts(layer, groups, x_RD, out_RD)
            return
        start = 0
        for part in self.residency.parts(layer, groups):
            stop = start + sum(num_rows for _, num_rows in part)
            self._experts(layer, part, x_RD[start:stop], out_RD[start:stop])
            start = stop

    def adopt(self, pairs: Sequence[Pair]) -> None:
        """Bring experts here that no other host serves."""
        with self._changing:
            fresh = set(pairs) - self.holds
            self._add(fresh)
            self._adopted |= fresh

    def add(self, pairs: Collection[Pair], progress: Callable[[int], None] = lambda num_done: None) -> None:
        """Map experts; those that are here already are no error. UnavailableError (NO_ROOM) beyond the capacity."""
        with self._changing:
            self._add(pairs, progress)

    def remove(self, pairs: Collection[Pair]) -> int:
        """Let go of experts, give their memory back and return the bytes; those that are not here are no error."""
        with self._changing:
            return self._remove(set(pairs) & self.holds)

    def keep(self, pairs: Collection[Pair], *, and_adopted: bool = False) -> int:
        """Let go of all but these, or but these and those adopted; return the bytes given back."""
        with self._changing:
            kept = set(pairs) | (self._adopted if and_adopted else set())
            return self._remove(self.holds - kept)

    @torch.inference_mode()
    def fingerprint(self, pair: Pair) -> str:
        """Digest an expert's weights, their format and its answer to fixed rows: two hosts that agree compute the same.

        Reads every byte of the stored weights, which also warms them; where they are copied, or may not all stay, they
        are let go again.
        """
        if pair not in self._fingerprints:
            weights = self._experts.weights(*pair)
            digest = hashlib.sha256(self._experts.weight_format.encode())
            for matrix in _matrices(weights):
                digest.update(payload_of(matrix.contiguous().cpu()))
            x_RD = golden_rows(self._experts.width, self._experts.dtype).to(self._experts.device)
            out_RD = torch.empty_like(x_RD)
            self._experts(pair[0], ((pair[1], len(x_RD)),), x_RD, out_RD)
            digest.update(payload_of(out_RD.cpu()))
            if self.residency is not None and not self.residency.is_resident(pair):
                self._let_go(pair)
            elif self._reads_copies:
                self._release(pair)
            self._fingerprints[pair] = digest.hexdigest()
        return self._fingerprints[pair]

    def _add(self, pairs: Collection[Pair], progress: Callable[[int], None] = lambda num_done: None) -> None:
        wanted = sorted(set(pairs) - self.holds)
        self._check_room(wanted)
        for num_done, pair in enumerate(wanted, start=1):
            self._experts.put({pair: self._checkpoint.expert(*self._cut.place(pair))})
            if self._experts.device.type != "cpu":  # it was copied: what is mapped is not read any more
                self._release(pair)
            progress(num_done)

    def _remove(self, pairs: Collection[Pair]) -> int:
        self._experts.drop(pairs)
        for pair in pairs:
            if self.residency is not None:
                self.residency.forget(pair)
            self._release(pair)
            self._fingerprints.pop(pair, None)  # the next one reads, and warms, what is mapped then
        self._adopted.difference_update(pairs)
        return sum(map(self._bytes_of, pairs))

    def _check_room(self, wanted: Collection[Pair]) -> None:
        if self._capacity_bytes is None:
            return
        free, needed = self._capacity_bytes - self.bytes_held, sum(map(self._bytes_of, wanted))
        if needed > free:
            name = "experts" if self._cut.num_slices == 1 else f"slices of experts cut in {self._cut.num_slices}"
            raise UnavailableError(
                f"{len(wanted)} {name} of {needed} bytes together do not fit: {free} of {self._capacity_bytes} are "
                "free; give the host more capacity, or the cluster more hosts",
                reason="NO_ROOM",
            )

    def _bytes_of(self, pair: Pair) -> int:
        return self._cut.bytes_of(pair[1])

    def _computed_bytes_of(self, pair: Pair) -> int:
        return self._cut.computed_bytes_of(pair[1])

    def _copied(self, pair: Pair) -> None:
        """Give the mapped pages of a copied expert back; of a copy of floats as stored, only where memory is short."""
        if self.residency is not None:
            self._release(pair, around=KERNEL_MAPS)
        elif self._reads_copies:
            self._release(pair)

    def _read_ahead(self, pair: Pair) -> None:
        self._checkpoint.read_ahead_expert(*self._cut.place(pair))

    def _let_go(self, pair: Pair) -> None:
        """Take a held expert out of memory; its next rows bring it back."""
        self._experts.cool(pair)
        self._release(pair, around=KERNEL_MAPS)

    def _release(self, pair: Pair, *, around: int = 0) -> None:
        self._checkpoint.release_expert(*self._cut.place(pair), around=around)


def golden_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Return the fixed rows of a fingerprint: [NUM_GOLDEN_ROWS, D], about as large as rows after a norm."""
    return torch.randn(NUM_GOLDEN_ROWS, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def _matrices(weights: AnyWeights) -> list[Tensor]:
    """List an expert's stored tensors, each once."""
    if isinstance(weights, QuantisedExpertWeights):
        return [part.view(torch.uint8) if part.itemsize == 1 else part for part in weights.tensors()]
    if weights.gate_up_D2F is not None:
        return [weights.gate_up_D2F, weights.down_FD]
    return [getattr(weights, field.name) for field in fields(weights) if field.name != "gate_up_D2F"]
