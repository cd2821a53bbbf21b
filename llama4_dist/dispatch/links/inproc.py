"""A link inside one process: frames are handed over as they are. Deterministic; can lose, double, swap, delay frames.

`poll` on the worker's end runs the server, so that one thread is enough; it never waits. Delays are by the given clock.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from llama4_dist.dispatch.layout import Groups
from llama4_dist.dispatch.links.link import Clock, Frame, FrameHeader, LinkLimits, LinkStats
from llama4_dist.errors import LinkDownError

# (layer, groups, x_RD) to y_RD, valid until the next question; None where a frame has to ask.
Answer = Callable[[int, Groups, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities per frame in this direction, drawn from `seed`; a delayed frame is visible after `delay_s`."""

    seed: int = 0
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.0


class InprocLink:
    """One end of a pair; see `inproc_pair`."""

    def __init__(
        self, peer: str, peer_incarnation: int, limits: LinkLimits, clock: Clock, faults: Faults | None
    ) -> None:
        self.peer = peer
        self.peer_incarnation = peer_incarnation
        self.limits = limits
        self.transport = "inproc"
        self.drive: Callable[[], object] | None = None  # runs the other side
        self.answer: Answer | None = None  # asks the other side without a frame
        self.is_alone: Callable[[], bool] = lambda: False  # whether the other side serves us only
        self._clock = clock
        self._faults = faults
        self._random = random.Random(faults.seed if faults else 0)  # noqa: S311 - a schedule of faults, not a secret
        self._inbox: deque[tuple[float, FrameHeader, Tensor | None]] = deque()
        self._free_slots = deque(range(limits.credit))
        self._down = False
        self.other: InprocLink = self
        self._stats = LinkStats()

    @property
    def num_unsent(self) -> int:
        """Frames the other side has not let go of: it reads our memory."""
        other = self.other
        return 0 if other._down else len(other._inbox) + other.limits.credit - len(other._free_slots)

    def post(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        if self._down or self.other._down:
            raise LinkDownError(f"link to {self.peer!r} is down; its rows must go elsewhere")
        self._stats.frames_out += 1
        self.other._accept(header, rows_ND, self._faults, self._random)

    def can_ask(self) -> bool:
        """Tell whether the other side would answer at once: nothing is on its way, and nobody else waits for it."""
        if self.answer is None or self._faults is not None or self._inbox or self._down:
            return False
        other = self.other
        return not (other._inbox or other._down) and self.is_alone()

    def ask(self, layer: int, groups: Groups, x_RD: Tensor) -> Tensor | None:
        """Have rows computed at once; None where a frame has to ask."""
        if self.answer is None or self._down or self.other._down:
            return None
        y_RD = self.answer(layer, groups, x_RD)
        if y_RD is not None:
            self._stats.frames_out += 1
            self._stats.frames_in += 1
        return y_RD

    def poll(self, timeout_s: float) -> Sequence[Frame]:
        frames = self._take()
        if not frames and self.drive is not None and not self._down:
            self.drive()
            frames = self._take()
        if not frames and (self._down or self.other._down):
            self._down = True
            raise LinkDownError(f"link to {self.peer!r} is down; its rows must go elsewhere")
        return frames

    def fileno(self) -> int | None:
        return None

    def abort(self) -> None:
        self._down = True
        self._inbox.clear()

    def stats(self) -> LinkStats:
        return self._stats

    def release_slot(self, slot: int) -> None:
        self._free_slots.append(slot)

    def _take(self) -> list[Frame]:
        """Return what is due, in order, as far as slots are free."""
        frames: list[Frame] = []
        if not self._inbox:
            return frames
        if self.other._faults is None and len(self._free_slots) >= len(self._inbox):
            frames = [Frame(header, rows, self, self._free_slots.pop()) for _, header, rows in self._inbox]
            self._inbox.clear()
            self._stats.frames_in += len(frames)
            return frames
        now = self._clock.monotonic()
        waiting = deque[tuple[float, FrameHeader, Tensor | None]]()
        while self._inbox:
            due, header, rows_RD = self._inbox.popleft()
            if due <= now and self._free_slots:
                frames.append(Frame(header, rows_RD, self, self._free_slots.pop()))
            else:
                waiting.append((due, header, rows_RD))
        self._inbox = waiting
        self._stats.frames_in += len(frames)
        return frames

    def _accept(self, header: FrameHeader, rows_RD: Tensor | None, faults: Faults | None, draw: random.Random) -> None:
        """Put a frame of the other side into the inbox, or do to it what the schedule of faults says."""
        if faults is None:
            self._inbox.append((0.0, header, rows_RD))
            return
        if draw.random() < faults.drop:
            return
        due = self._clock.monotonic() + faults.delay_s if draw.random() < faults.delay else 0.0
        copies = 2 if draw.random() < faults.duplicate else 1
        for _ in range(copies):
            # A frame on its way must not change when the sender reuses its memory, as on a socket.
            frame = (due, header, None if rows_RD is None else rows_RD.clone())
            if draw.random() < faults.reorder:
                self._inbox.appendleft(frame)
            else:
                self._inbox.append(frame)


def inproc_pair(
    *,
    worker: str,
    host: str,
    limits: LinkLimits,
    worker_incarnation: int = 0,
    host_incarnation: int = 0,
    clock: Clock = time,
    to_host: Faults | None = None,
    to_worker: Faults | None = None,
) -> tuple[InprocLink, InprocLink]:
    """Return the worker's end and the host's end. `to_host` and `to_worker` are the faults of each direction."""
    workers_end = InprocLink(host, host_incarnation, limits, clock, to_host)
    hosts_end = InprocLink(worker, worker_incarnation, limits, clock, to_worker)
    workers_end.other, hosts_end.other = hosts_end, workers_end
    return workers_end, hosts_end
