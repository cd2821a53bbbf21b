"""Rows in fewer bytes on their way: rounded by the sender, widened again by the receiver. Knows no routing.

A row is rounded by itself, so what a token gets depends neither on its batch nor on the host; but it is another answer
than without. Both ends must agree, in the handshake.
"""

from collections import deque
from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

from llama4_dist.dispatch.links.link import Frame, FrameHeader, Link, LinkStats
from llama4_dist.errors import ConfigError

BLOCK = 128  # values that share a scale
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SCALE_BYTES = 4


class Wire(StrEnum):
    MODEL = ""  # as the model computes
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8_e4m3"  # with a float32 scale for each block of a row


class WireFormat:
    """How rows [N, width] of `dtype` travel: as rows of `wire_width` values of `wire_dtype`."""

    def __init__(self, wire: str, width: int, dtype: torch.dtype) -> None:
        """ConfigError for a format that is none."""
        if wire not in list(Wire):
            raise ConfigError(f"wire={wire!r} is no format: choose one of {', '.join(repr(one.value) for one in Wire)}")
        self.wire = wire
        self._width = width
        self._dtype = dtype
        self._num_blocks = -(-width // BLOCK)  # the last one may be shorter
        self.wire_dtype, self.wire_width = dtype, width
        if wire == Wire.BFLOAT16:
            self.wire_dtype = torch.bfloat16
        elif wire == Wire.FLOAT8:
            self.wire_dtype, self.wire_width = torch.uint8, width + self._num_blocks * _SCALE_BYTES

    def pack(self, rows_ND: Tensor) -> Tensor:
        """Return rows as they travel."""
        if self.wire != Wire.FLOAT8:
            return rows_ND.to(self.wire_dtype)
        blocks = self._blocks(rows_ND.float())
        scales = blocks.abs().amax(dim=-1) / _LARGEST
        scales = torch.where(scales > 0, scales, 1.0)  # a scale that is not a number makes its block none
        values = (blocks / scales[:, :, None]).flatten(1)[:, : self._width].to(torch.float8_e4m3fn)
        return torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), dim=1)

    def round(self, rows_ND: Tensor) -> Tensor:
        """Return rows as they arrive."""
        return self.unpack(self.pack(rows_ND))

    def unpack(self, packed: Tensor) -> Tensor:
        """Return rows as the model computes them."""
        if self.wire != Wire.FLOAT8:
            return packed.to(self._dtype)
        values_ND = packed[:, : self._width].contiguous().view(torch.float8_e4m3fn).float()
        scales = packed[:, self._width :].contiguous().view(torch.float32)
        scaled = self._blocks(values_ND) * scales[:, :, None]
        return scaled.flatten(1)[:, : self._width].to(self._dtype).contiguous()

    def _blocks(self, rows_ND: Tensor) -> Tensor:
        """Return [N, blocks, BLOCK], the last block filled up with zeros."""
        filled = functional.pad(rows_ND, (0, self._num_blocks * BLOCK - self._width))
        return filled.view(len(rows_ND), self._num_blocks, BLOCK)


class WireLink:
    """A link whose rows travel in another format; `inner` is a link for rows as they travel."""

    def __init__(self, inner: Link, form: WireFormat) -> None:
        self.inner = inner
        self.peer = inner.peer
        self.peer_incarnation = inner.peer_incarnation
        self.limits = inner.limits
        self.transport = inner.transport
        self._form = form
        self._packed: deque[Tensor] = deque()  # kept until they are sent, oldest first

    @property
    def num_unsent(self) -> int:
        """Frames not yet sent; the rows given to `post` themselves are needed no longer than that call."""
        return self.inner.num_unsent

    def post(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        packed = None if rows_ND is None else self._form.pack(rows_ND)
        self.inner.post(header, packed)
        if packed is not None:
            self._packed.append(packed)
        while len(self._packed) > self.inner.num_unsent:
            self._packed.popleft()

    def poll(self, timeout_s: float) -> Sequence[Frame]:
        frames = self.inner.poll(timeout_s)
        for frame in frames:
            if frame.rows_RD is not None:
                frame.rows_RD = self._form.unpack(frame.rows_RD)
        return frames

    def fileno(self) -> int | None:
        return self.inner.fileno()

    def abort(self) -> None:
        self.inner.abort()
        self._packed.clear()

    def stats(self) -> LinkStats:
        return self.inner.stats()
