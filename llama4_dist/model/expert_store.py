"""The experts of one host, mapped from its checkpoint: they come and go while others compute. Knows no network.

Weights are read-only views of the mapped file wherever dtype and device allow, so that a host serves before its pages
are warm, and a killed one is gone at once. In int8 an expert takes memory of its own from its first rows on, and gives
back what was mapped.
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
from llama4_dist.model.expert import AnyWeights, Experts, Pair
from llama4_dist.model.weight_format import INT8, STORED, expert_bytes

NUM_GOLDEN_ROWS = 4


class RoutedExperts(Protocol):
    """What a store asks of whoever computes; `model.expert.Experts` documents it, `gpu.experts.GpuExperts` has it."""

    weight_format: str
    width: int
    dtype: torch.dtype
    device: torch.device
    holds: frozenset[Pair]

    def put(self, weights: Mapping[Pair, AnyWeights]) -> None: ...

    def drop(self, pairs: Collection[Pair]) -> None: ...

    def weights(self, layer: int, expert: int) -> AnyWeights: ...

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None: ...


class ExpertStore:
    """Satisfies `dispatch.ExpertCompute`. One thread computes, any may add and remove.

    `capacity_bytes` bounds the weights held; None = no bound. `experts`, which hold none yet, compute in place of
    `model.expert.Experts`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        weight_format: str = STORED,
        capacity_bytes: int | None = None,
        experts: RoutedExperts | None = None,
    ) -> None:
        config = checkpoint.config
        self._checkpoint = checkpoint
        self._experts = experts or Experts(
            {},
            width=config.hidden_size,
            dtype=dtype,
            device=device,
            weight_format=weight_format,
            on_copied=lambda pair: checkpoint.release_expert(*pair),
        )
        self._capacity_bytes = capacity_bytes
        self._changing = threading.Lock()
        self._adopted: set[Pair] = set()
        self._fingerprints: dict[Pair, str] = {}
        self.expert_bytes = expert_bytes(config, dtype=dtype, weight_format=weight_format)
        if checkpoint.scheme is not None:  # as many as the largest takes; what is expanded has a bound of its own
            self.expert_bytes = max(checkpoint.expert_bytes(layer, 0) for layer in config.moe_layer_ids)

    @property
    def holds(self) -> frozenset[Pair]:
        """The (layer, expert) pairs that are here."""
        return self._experts.holds

    @property
    def bytes_held(self) -> int:
        return len(self.holds) * self.expert_bytes

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        """Compute rows; see `Experts`."""
        self._experts(layer, groups, x_RD, out_RD)

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

        Reads every byte of the stored weights, which also warms them; in int8 the copy is made, and they are let go.
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
            if self._experts.weight_format == INT8:
                self._checkpoint.release_expert(*pair)
            self._fingerprints[pair] = digest.hexdigest()
        return self._fingerprints[pair]

    def _add(self, pairs: Collection[Pair], progress: Callable[[int], None] = lambda num_done: None) -> None:
        wanted = sorted(set(pairs) - self.holds)
        self._check_room(len(wanted))
        for num_done, pair in enumerate(wanted, start=1):
            self._experts.put({pair: self._checkpoint.expert(*pair)})
            if self._experts.device.type != "cpu":  # it was copied: what is mapped is not read any more
                self._checkpoint.release_expert(*pair)
            progress(num_done)

    def _remove(self, pairs: Collection[Pair]) -> int:
        self._experts.drop(pairs)
        for pair in pairs:
            self._checkpoint.release_expert(*pair)
            self._fingerprints.pop(pair, None)  # the next one reads, and warms, what is mapped then
        self._adopted.difference_update(pairs)
        return len(pairs) * self.expert_bytes

    def _check_room(self, num_more: int) -> None:
        if self._capacity_bytes is None:
            return
        free = self._capacity_bytes - self.bytes_held
        if num_more * self.expert_bytes > free:
            raise UnavailableError(
                f"{num_more} experts of {self.expert_bytes} bytes do not fit: {free} of {self._capacity_bytes} are "
                "free; give the host more capacity, or the cluster more hosts",
                reason="NO_ROOM",
            )


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
