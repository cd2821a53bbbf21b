"""Quantised weights as a checkpoint stores them, and the numbers they stand for. Knows no file and no rows.

Layouts are those of compressed-tensors (`compressors/pack_quantized/helpers.py`): integers are stored plus half their
range, two of four bits in a byte, the one of the lower input in its lower half.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llama4_dist.checkpoint.scheme import Number, Scheme

FLOAT8 = torch.float8_e4m3fn
WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantisedLinear:
    """An output-major weight [F, D] as numbers and scales; views of the mapped checkpoint, never written to.

    `stored` is float8 or int8 [F, D], or uint8 [F, D · bits / 8] where packed, with padding behind; `scales_FG` has G
    groups of an output's inputs, in whatever float they are stored.
    """

    scheme: Scheme
    width: int  # D
    stored: Tensor
    scales_FG: Tensor

    @property
    def num_outputs(self) -> int:
        return self.stored.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.stored, self.scales_FG))

    def numbers(self) -> Tensor:
        """Return the numbers before scales: float8 or int8 [F, D]."""
        if not self.scheme.is_packed:
            return self.stored
        return unpack(self.stored, self.scheme.number)[:, : self.width]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return number · scale [F, D], multiplied in `dtype`, or in float32 where that is narrower."""
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        groups = self.numbers().to(wide).view(*self.scales_FG.shape, -1)
        weight: Tensor = (groups * self.scales_FG.to(wide)[..., None]).flatten(1).to(dtype)
        return weight

    def to(self, device: torch.device | str) -> "QuantisedLinear":
        """Return the same on `device`."""
        parts = {name: getattr(self, name).to(device) for name in ("stored", "scales_FG")}
        return QuantisedLinear(scheme=self.scheme, width=self.width, **parts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantisedExpertWeights:
    """The three linears of a routed expert, or of a slice of its width F; all of one scheme."""

    gate_FD: QuantisedLinear
    up_FD: QuantisedLinear
    down_DF: QuantisedLinear

    @property
    def scheme(self) -> Scheme:
        return self.gate_FD.scheme

    def linears(self) -> tuple[QuantisedLinear, QuantisedLinear, QuantisedLinear]:
        return self.gate_FD, self.up_FD, self.down_DF

    def tensors(self) -> Iterator[Tensor]:
        """Yield every stored tensor once."""
        for linear in self.linears():
            yield linear.stored
            yield linear.scales_FG

    def to(self, device: torch.device | str) -> "QuantisedExpertWeights":
        """Return the same on `device`."""
        return QuantisedExpertWeights(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def pack(numbers_FD: Tensor, number: Number) -> Tensor:
    """Return int8 numbers as they are stored: int32 [F, ceil(D · bits / 32)], filled up with zero bits."""
    biased = numbers_FD.to(torch.int16).add(1 << (number.bits - 1)).to(torch.uint8)
    per_word = WORD_BITS // number.bits
    biased = torch.nn.functional.pad(biased, (0, -biased.shape[1] % per_word))
    if number is Number.INT4:
        biased = biased[:, 0::2] | (biased[:, 1::2] << 4)
    return biased.contiguous().view(torch.int32)


def unpack(stored: Tensor, number: Number) -> Tensor:
    """Return the int8 numbers of packed bytes: [F, bytes · 8 / bits], those of the padding included."""
    if number is Number.INT4:
        stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)
    return stored.to(torch.int16).sub_(1 << (number.bits - 1)).to(torch.int8)
