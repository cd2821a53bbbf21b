"""One direction of a proxied connection: decides which bytes may go when; knows no socket and no clock."""

import random
from collections import deque
from dataclasses import dataclass

from tests.faults.toxics import NONE, Counters, Toxics

MAX_BUFFERED = 256 * 1024  # beyond it the sender is not read, so that a slow direction presses back
SLICE_PAUSE_S = 0.001  # so that slices arrive apart
MAX_SEND = 64 * 1024


@dataclass(slots=True)
class Chunk:
    """Bytes that came together, and when they may leave."""

    data: memoryview
    due_s: float
    was_delayed: bool


class Pipe:
    """Bytes in by `take`, out by `ready` and `sent`. `now_s` is the caller's clock."""

    def __init__(self, counters: Counters, seed: str) -> None:
        self.toxics = NONE
        self.counters = counters
        self.at_end = False  # the sender has finished
        self.is_shut = False  # the receiver was told so, by the sender's end or by a half-close
        self.is_discarding = False
        self._random = random.Random(seed)
        self._chunks: deque[Chunk] = deque()
        self._num_buffered = 0
        self._next_send_s = 0.0
        self._num_seen = 0
        self._left: int | None = None  # bytes that may still pass, under silent_after or drop_after

    def change(self, toxics: Toxics) -> None:
        """Take on other toxics; a byte limit counts from here."""
        self.toxics = toxics
        limits = [limit for limit in (toxics.silent_after, toxics.drop_after) if limit is not None]
        self._left = min(limits) if limits else None
        self.counters.num_cut += self._left == 0
        self._num_seen = 0

    @property
    def wants_more(self) -> bool:
        """Whether the sender should be read."""
        return not (self.at_end or self.toxics.blackhole or self._num_buffered >= MAX_BUFFERED)

    @property
    def is_cut(self) -> bool:
        """Whether the byte limit is used up."""
        return self._left == 0

    @property
    def is_finished(self) -> bool:
        """Whether the receiver should now be told of the sender's end."""
        return self.at_end and not (self._chunks or self.toxics.blackhole or self.is_cut or self.is_shut)

    @property
    def num_buffered(self) -> int:
        return self._num_buffered

    def take(self, data: bytes, now_s: float) -> None:
        """Take what the sender sent."""
        self.counters.read += len(data)
        if self.is_discarding:
            self.counters.dropped += len(data)
            return
        toxics = self.toxics
        due_s = now_s + toxics.delay_s + self._random.uniform(0.0, toxics.jitter_s)
        if self._chunks:
            due_s = max(due_s, self._chunks[-1].due_s)
        self._chunks.append(Chunk(memoryview(self._corrupt(data)), due_s, toxics.delay_s + toxics.jitter_s > 0))
        self._num_buffered += len(data)

    def due_s(self, now_s: float) -> float | None:
        """When the next bytes may leave; None while nothing waits or nothing may pass."""
        if not self._chunks or self.toxics.blackhole or self.is_cut:
            return None
        return max(self._chunks[0].due_s, self._next_send_s, now_s)

    def ready(self, now_s: float) -> bytes | memoryview:
        """Return bytes to send now; b"" when none is due. Follow with `sent`."""
        due_s = self.due_s(now_s)
        if due_s is None or due_s > now_s:
            return b""
        toxics, limit = self.toxics, MAX_SEND
        if toxics.slice_bytes is not None:
            limit = min(limit, toxics.slice_bytes)
        if toxics.bytes_per_s is not None:
            limit = min(limit, max(1, int(toxics.bytes_per_s / 100)))  # a hundredth of a second's worth
        if self._left is not None:
            limit = min(limit, self._left)
        return self._chunks[0].data[:limit]

    def sent(self, num_bytes: int, now_s: float) -> None:
        """Note how much of it the receiver's socket took."""
        if not num_bytes:
            return
        chunk = self._chunks[0]
        self._num_buffered -= num_bytes
        self.counters.passed += num_bytes
        self.counters.num_sends += 1
        self.counters.delayed += num_bytes * chunk.was_delayed
        chunk.data = chunk.data[num_bytes:]
        if not chunk.data:
            self._chunks.popleft()
        if self._left is not None:
            self._left -= num_bytes
            self.counters.num_cut += self._left == 0
        pause_s = SLICE_PAUSE_S if self.toxics.slice_bytes is not None else 0.0
        if self.toxics.bytes_per_s is not None:
            pause_s = max(pause_s, num_bytes / self.toxics.bytes_per_s)
        self._next_send_s = now_s + pause_s

    def discard(self) -> None:
        """Throw away what waits and all that comes."""
        self.is_discarding = True
        self.counters.dropped += self._num_buffered
        self._chunks.clear()
        self._num_buffered = 0

    def _corrupt(self, data: bytes) -> bytes:
        every = self.toxics.corrupt_every
        if every is None:
            return data
        spoilt = bytearray(data)
        for place in range((every - 1 - self._num_seen) % every, len(data), every):
            spoilt[place] ^= 1 << self._random.randrange(8)
            self.counters.corrupted += 1
        self._num_seen += len(data)
        return bytes(spoilt)
