"""An expert host's view of one attention worker: its link, and the memory its replies lie in until they are sent."""

from collections import deque

import torch
from torch import Tensor

from llama4_dist.dispatch.links.link import Link
from llama4_dist.dispatch.links.socket import SocketLink
from llama4_dist.dispatch.row_buffers import RowBuffer
from llama4_dist.errors import LinkDownError


class WorkerLink:
    """One attention worker's link and reply buffers."""

    def __init__(self, link: Link, width: int, dtype: torch.dtype) -> None:
        self.link = link
        self._width = width
        self._dtype = dtype
        self._free: list[RowBuffer] = []
        self._lent: deque[RowBuffer] = deque()  # oldest first, as they are sent
        self._num_buffers = 0
        self._row_bytes = width * dtype.itemsize
        self._shared = link.shared if isinstance(link, SocketLink) else None
        self._scratch: RowBuffer | None = None

    def reclaim(self) -> None:
        """Take back the memory of replies that are sent; call when every buffer lent has been posted."""
        if self._shared is not None:
            self._shared.give_back()
        unsent = self.link.num_unsent
        while len(self._lent) > unsent:
            self._free.append(self._lent.popleft())

    def scratch(self, num_rows: int, device: torch.device) -> Tensor:
        """Return memory for an answer that is read before the next one is asked for."""
        if self._scratch is None or self._scratch.capacity < num_rows:
            capacity = max(64, 1 << (num_rows - 1).bit_length())
            self._scratch = RowBuffer(capacity, self._width, self._dtype, device)
        return self._scratch.rows(num_rows)

    def reply_rows(self, num_rows: int, device: torch.device) -> Tensor:
        """Return memory for a reply; LinkDownError when the worker leaves more replies unread than allowed."""
        limits = self.link.limits
        if self._shared is not None and num_rows * self._row_bytes >= limits.shared_from_bytes:
            rows_RD = self._shared.take(num_rows)
            if rows_RD is not None:
                return rows_RD
        if not self._free:
            if self._num_buffers == 2 * limits.credit:
                raise LinkDownError(f"worker {self.link.peer!r} does not read its replies", reason="REPLIES_UNREAD")
            self._num_buffers += 1
            self._free.append(RowBuffer(limits.max_rows, self._width, self._dtype, device))
        buffer = self._free.pop()
        self._lent.append(buffer)
        return buffer.rows(num_rows)
