"""When a wait looks again and when it sleeps; time passes only as the test says."""

from llama4_dist.dispatch.links.patience import Events, Patience, looking

READY: Events = [(7, 1)]


class Descriptors:
    """Becomes ready at `ready_at`; a look takes `look_s`, a sleep until then. `sleeps` counts the polls that slept."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ready_at = 0.0
        self.look_s = 1e-6
        self.sleeps = 0

    def clock(self) -> float:
        return self.now

    def poll(self, timeout_s: float) -> Events:
        if timeout_s == 0.0:
            self.now += self.look_s
        else:
            self.sleeps += 1
            self.now += min(max(self.ready_at - self.now, 0.0), timeout_s)
        return READY if self.now >= self.ready_at else []


def wait(patience: Patience, descriptors: Descriptors, seconds: float) -> int:
    """Wait for what comes in so many seconds; return how often the wait slept."""
    descriptors.ready_at = descriptors.now + seconds
    before = descriptors.sleeps
    assert patience.wait(10.0) == READY
    return descriptors.sleeps - before


def patience_over(descriptors: Descriptors) -> Patience:
    return Patience(descriptors.poll, looking(descriptors.poll, descriptors.clock), 200e-6, descriptors.clock)


def test_what_comes_soon_is_found_without_sleeping() -> None:
    descriptors = Descriptors()
    patience = patience_over(descriptors)
    assert [wait(patience, descriptors, 50e-6) for _ in range(5)] == [0] * 5


def test_after_a_long_wait_the_next_sleeps_at_once_until_one_was_short() -> None:
    descriptors = Descriptors()
    patience = patience_over(descriptors)
    assert wait(patience, descriptors, 1.0) == 1
    descriptors.look_s = 1.0  # a look would be noticed
    started = descriptors.now
    assert wait(patience, descriptors, 1e-3) == 1
    assert wait(patience, descriptors, 50e-6) == 1
    assert descriptors.now - started < 2e-3
    descriptors.look_s = 1e-6
    assert wait(patience, descriptors, 50e-6) == 0


def test_where_looking_loses_the_core_many_waits_sleep() -> None:
    descriptors = Descriptors()
    patience = patience_over(descriptors)
    descriptors.look_s = 3e-3  # another thread ran for its whole time slice
    wait(patience, descriptors, 10e-3)
    assert [wait(patience, descriptors, 50e-6) for _ in range(64)] == [1] * 64
    descriptors.look_s = 1e-6
    assert wait(patience, descriptors, 50e-6) == 0


def test_nothing_is_returned_when_the_time_is_over() -> None:
    descriptors = Descriptors()
    descriptors.ready_at = float("inf")
    patience = patience_over(descriptors)
    for timeout_s in (0.0, 100e-6, 1.0):
        started = descriptors.now
        assert patience.wait(timeout_s) == []
        assert descriptors.now - started < timeout_s + 10e-6
