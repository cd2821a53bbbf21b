"""Frames of all workers that wait to be computed, by layer, and until when. Computes nothing, knows no sockets."""

import time

from llama4_dist.dispatch.links.link import Frame
from llama4_dist.dispatch.worker_link import WorkerLink

_SHORTEST = 64  # a window shrinks to this part of the longest, so that it can grow again
QueuedFrames = list[tuple[WorkerLink, Frame]]


class _Layer:
    """Frames of one layer, to be computed together at `due`."""

    __slots__ = ("due", "frames")

    def __init__(self, due: float) -> None:
        self.due = due
        self.frames: QueuedFrames = []


class FrameQueue:
    """Collects frames per layer for a window of at most `pool_window_s`.

    The window is half as long after one in which nobody else came, and twice as long again after one that brought
    frames together: workers that compute other layers, or that stand still, soon cost next to nothing.
    """

    def __init__(self, pool_window_s: float) -> None:
        self._longest_s = pool_window_s
        self.window_s = pool_window_s  # now
        self.layers: dict[int, _Layer] = {}  # in the order of their first frame

    @property
    def is_idle(self) -> bool:
        """Whether a frame that comes now need not wait, neither for its turn nor for others."""
        return not self.layers and not self._longest_s

    @property
    def num_frames(self) -> int:
        return sum(len(layer.frames) for layer in self.layers.values())

    def add(self, worker: WorkerLink, frame: Frame) -> None:
        number = frame.header.layer
        layer = self.layers.get(number)
        if layer is None:
            due = time.monotonic() + self.window_s if self._longest_s else 0.0
            layer = self.layers[number] = _Layer(due)
        layer.frames.append((worker, frame))

    def shorten(self, timeout_s: float) -> float:
        """Return how long to wait for more: not beyond the first layer's window. Call when some frame is queued."""
        first_due = min(layer.due for layer in self.layers.values())
        return max(0.0, min(timeout_s, first_due - time.monotonic()))

    def take_due(self, num_workers: int) -> list[tuple[int, QueuedFrames]]:
        """Take the layers that have a frame of every worker there is, or have waited for their window."""
        due = [(number, layer.frames) for number, layer in self.layers.items() if self._is_due(layer, num_workers)]
        for number, _ in due:
            del self.layers[number]
        return due

    def _is_due(self, layer: _Layer, num_workers: int) -> bool:
        if self._longest_s == 0.0:
            return True
        num_come = len({id(worker) for worker, _ in layer.frames})
        if num_come < num_workers and time.monotonic() < layer.due:
            return False
        if num_come > 1:
            self.window_s = min(self._longest_s, 2 * self.window_s)
        elif num_workers > 1:
            self.window_s = max(self._longest_s / _SHORTEST, self.window_s / 2)
        return True
