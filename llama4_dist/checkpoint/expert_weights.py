"""The weights of one routed expert, or of a slice of its width."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    """Input-major (x @ W) views of the mapped checkpoint; F is the slice's width. Never write to them.

    `gate_up_D2F` holds the bytes of gate and up as one matrix, gate columns first; only a whole expert of a fused
    checkpoint has it.
    """

    gate_DF: Tensor
    up_DF: Tensor
    down_FD: Tensor
    gate_up_D2F: Tensor | None = None
