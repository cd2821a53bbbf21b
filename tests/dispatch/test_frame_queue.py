"""How long frames wait for others: never longer than the window, and hardly where waiting is of no use."""

from typing import Any, cast

import pytest

from llama4_dist.dispatch import frame_queue as module
from llama4_dist.dispatch.frame_queue import FrameQueue
from llama4_dist.dispatch.links.link import Frame, FrameHeader, FrameKind
from llama4_dist.dispatch.worker_link import WorkerLink

WINDOW_S = 0.064


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def worker() -> WorkerLink:
    return cast(WorkerLink, object())


def frame(layer: int) -> Frame:
    return Frame(FrameHeader(FrameKind.ROWS, 1, 0, 0, layer, 1, ((0, 1),)), None, cast(Any, None), 0)


def waited_s(queue: FrameQueue, clock: Clock, num_workers: int, *workers: WorkerLink) -> float:
    """Queue a frame of each worker and return how long until all are due."""
    began_s = clock.now
    for one in workers:
        queue.add(one, frame(3))
    while not (due := queue.take_due(num_workers)):
        clock.now += queue.shorten(10.0)
    assert [(layer, len(frames)) for layer, frames in due] == [(3, len(workers))]
    return clock.now - began_s


def test_who_is_complete_or_alone_does_not_wait(clock: Clock) -> None:
    queue, first, second = FrameQueue(WINDOW_S), worker(), worker()
    assert waited_s(queue, clock, 2, first, second) == 0.0
    assert waited_s(queue, clock, 1, first) == 0.0
    assert queue.window_s == WINDOW_S


def test_a_worker_that_died_after_it_asked_is_not_one_too_few(clock: Clock) -> None:
    queue, dead, alive = FrameQueue(WINDOW_S), worker(), worker()
    assert waited_s(queue, clock, 1, dead, alive) == 0.0


def test_a_worker_that_stands_still_costs_less_and_less(clock: Clock) -> None:
    queue, alive = FrameQueue(WINDOW_S), worker()
    waits = [waited_s(queue, clock, 2, alive) for _ in range(10)]
    assert waits[:4] == pytest.approx([WINDOW_S, WINDOW_S / 2, WINDOW_S / 4, WINDOW_S / 8])
    assert waits[-1] == pytest.approx(WINDOW_S / 64)
    assert sum(waits) < 2.2 * WINDOW_S


def test_the_window_grows_again_when_frames_come_together_and_never_beyond_the_longest(clock: Clock) -> None:
    queue, first, second = FrameQueue(WINDOW_S), worker(), worker()
    for _ in range(3):
        waited_s(queue, clock, 2, first)
    assert queue.window_s == pytest.approx(WINDOW_S / 8)
    for _ in range(5):
        waited_s(queue, clock, 2, first, second)
    assert queue.window_s == WINDOW_S


def test_without_a_window_nobody_waits(clock: Clock) -> None:
    queue = FrameQueue(0.0)
    assert queue.is_idle
    assert waited_s(queue, clock, 5, worker()) == 0.0
    assert not FrameQueue(WINDOW_S).is_idle
