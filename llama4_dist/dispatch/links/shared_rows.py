"""Memory that two processes of a link share, for rows whose frames go by the socket. Knows neither frames nor sockets.

The worker makes two memories without a name and passes them by the Unix socket, one for rows and one for replies: when
the last process that holds them ends, however it ends, they are gone. They cannot shrink, and where rows lie is checked
by `frame`, so no peer makes us read outside of them. Their rows carry no checksum: nothing carried them anywhere.

Slots are used again when their rows were read. A worker's are free when the frame is answered; a host's when the worker
says how many replies it has read, which it does in the next frame with rows in this memory.
"""

import contextlib
import fcntl
import mmap
import os
from collections import deque

import torch
from torch import Tensor

from llama4_dist.dispatch.frame import FrameRules
from llama4_dist.errors import FrameError, HandshakeError

MEMORIES = b"L4DM"  # what the descriptors travel with
_PAGE = 4096
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MAX_VIEWS = 64


def is_possible() -> bool:
    """Tell whether this system has memories without a name."""
    return hasattr(os, "memfd_create")


def make_memories(rules: FrameRules, credit: int) -> list[int]:
    """Return descriptors of memory for rows and for replies; nothing of it is used yet. The caller closes them."""
    descriptors: list[int] = []
    try:
        for num_bytes in _sizes(rules, credit):
            descriptors.append(os.memfd_create("llama4_dist_rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(descriptors[-1], num_bytes)
            fcntl.fcntl(descriptors[-1], fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        close_all(descriptors)
        raise
    return descriptors


def close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class SharedRows:
    """One side's view of both memories; `initiator` is the side that sends ROWS. FrameError when the peer lies."""

    def __init__(self, descriptors: list[int], rules: FrameRules, credit: int, *, initiator: bool) -> None:
        """Map what `make_memories` made here or at the peer; HandshakeError for anything else."""
        sizes = _sizes(rules, credit)
        if len(descriptors) != len(sizes):
            raise _refused(f"{len(descriptors)} descriptors came, {len(sizes)} are needed")
        rows, replies = [_map(descriptor, num_bytes) for descriptor, num_bytes in zip(descriptors, sizes, strict=True)]
        self._dtype = rules.dtype
        self._width = rules.width
        self._incoming, self._outgoing = (replies, rows) if initiator else (rows, replies)
        self.num_incoming_bytes = self._incoming.nbytes
        self._start = self._outgoing.data_ptr()
        self._slot_bytes = _slot_bytes(rules)
        self._free = deque(range(self._outgoing.nbytes // self._slot_bytes))
        self._taken: list[int] = []  # by the caller, who has not posted them
        self._by_number: dict[int, int] = {}  # a worker's: frame number to slot
        self._posted: deque[int] = deque()  # a host's, oldest first
        self._num_acknowledged = 0
        self.num_read = 0  # replies of the peer that were let go
        self._views: dict[tuple[int, int, int], Tensor] = {}

    def rows_at(self, offset: int, num_rows: int) -> Tensor:
        """Return rows of the peer; `frame` has checked that they lie inside."""
        return self._view(self._incoming, offset, num_rows)

    def copy_in(self, number: int, rows_RD: Tensor) -> int:
        """Copy a worker's rows to a slot; return its offset, or -1 where none is free."""
        if not self._free:
            return -1
        slot = self._by_number[number] = self._free.popleft()
        offset = slot * self._slot_bytes
        self._view(self._outgoing, offset, rows_RD.shape[0]).copy_(rows_RD)
        return offset

    def answered(self, number: int) -> None:
        """Note that the peer needs the rows of this frame no more."""
        slot = self._by_number.pop(number, None)
        if slot is not None:
            self._free.appendleft(slot)

    def take(self, num_rows: int) -> Tensor | None:
        """Return memory for a host's reply, to be posted as it is; None where none is free."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self._taken.append(slot)
        return self._view(self._outgoing, slot * self._slot_bytes, num_rows)

    def post(self, rows_RD: Tensor) -> int:
        """Return the offset of a reply that lies in memory that was taken, which is the peer's now; -1 for others."""
        offset = rows_RD.data_ptr() - self._start
        slot = offset // self._slot_bytes
        if slot not in self._taken:
            return -1
        self._taken.remove(slot)
        self._posted.append(slot)
        return offset

    def give_back(self) -> None:
        """Take back what was taken and is not going to be posted."""
        self._free.extendleft(self._taken)
        self._taken.clear()

    def acknowledge(self, num_read: int) -> None:
        """Note how many replies the peer has read since the link came up."""
        if not self._num_acknowledged <= num_read <= self._num_acknowledged + len(self._posted):
            raise FrameError(f"the peer says it has read {num_read} replies", reason="ACKNOWLEDGED_WRONG")
        while self._num_acknowledged < num_read:
            self._num_acknowledged += 1
            self._free.appendleft(self._posted.popleft())

    def close(self) -> None:
        """Let go of both memories; they are unmapped when the last frame with rows there is let go too."""
        self._views.clear()
        self._free.clear()
        self._taken.clear()
        self._incoming = self._outgoing = torch.empty(0, dtype=torch.uint8)

    def _view(self, memory: Tensor, offset: int, num_rows: int) -> Tensor:
        """Return [num_rows, width]; the same view again where it repeats, as in decode."""
        key = (memory is self._incoming, offset, num_rows)
        view_RD = self._views.get(key)
        if view_RD is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            num_bytes = num_rows * self._width * self._dtype.itemsize
            view_RD = memory[offset : offset + num_bytes].view(self._dtype).view(num_rows, self._width)
            self._views[key] = view_RD
        return view_RD


def _slot_bytes(rules: FrameRules) -> int:
    return -(-rules.max_payload_bytes // _PAGE) * _PAGE


def _sizes(rules: FrameRules, credit: int) -> tuple[int, int]:
    """Return the bytes for rows and for replies; a reply is known to be read only with the question after it."""
    return credit * _slot_bytes(rules), 2 * credit * _slot_bytes(rules)


def _map(descriptor: int, num_bytes: int) -> Tensor:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        found = os.fstat(descriptor).st_size
    except OSError as error:
        raise _refused(f"a descriptor is no such memory: {error.strerror}") from None
    if seals & _SEALS != _SEALS:
        raise _refused("a memory can shrink while it is read")
    if found != num_bytes:
        raise _refused(f"a memory has {found} bytes instead of {num_bytes}")
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def _refused(message: str) -> HandshakeError:
    return HandshakeError(message, reason="SHARED_MEMORY_WRONG")
