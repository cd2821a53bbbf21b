"""Page-locked memory of the host, used again and again: what leaves or reaches a device in one copy lies here."""

import torch
from torch import Tensor


class PinnedMemory:
    """Bytes on the host that `device` copies from and to by itself; plain memory where the device is the processor.

    Whoever takes the bytes again first waits for the copies of before: see `wait_for`.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return `num_bytes` of it, uint8; they are the same bytes in every call."""
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(1 << (num_bytes - 1).bit_length(), dtype=torch.uint8, pin_memory=self._is_pinned)
        return self._bytes[:num_bytes]

    def rows(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return the same bytes as rows [num_rows, width]."""
        return self.take(num_rows * width * dtype.itemsize).view(dtype).view(num_rows, width)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what this thread's stream was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
