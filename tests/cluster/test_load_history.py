"""A window ends now and begins at an earlier reading, where there is one of the right age."""

from collections.abc import Iterator

import pytest

from cluster.admin.calls import AdminCalls
from cluster.admin.load_history import LoadHistory
from tests.cluster.memory_control import MemoryControl


@pytest.fixture
def calls() -> Iterator[AdminCalls]:
    made = AdminCalls(num_threads=2, timeout_s=20)
    yield made
    made.close()


async def test_a_window_reaches_back_to_a_reading_of_its_age(calls: AdminCalls) -> None:
    control = MemoryControl()
    history = LoadHistory(control, calls)
    first = await history.recent(0.5)
    await calls.pause(0.5)
    before, now = await history.window(0.5)
    assert before is first
    assert now.taken_s - before.taken_s >= 0.5
    assert control.num_loads == 2


async def test_a_reading_too_old_for_a_window_is_not_its_begin(calls: AdminCalls) -> None:
    control = MemoryControl()
    history = LoadHistory(control, calls)
    first = await history.recent(0.1)
    await calls.pause(0.3)
    before, now = await history.window(0.1)
    assert before is not first
    assert now.taken_s - before.taken_s >= 0.1


async def test_callers_at_the_same_time_share_a_reading(calls: AdminCalls) -> None:
    control = MemoryControl()
    history = LoadHistory(control, calls)
    assert await history.recent(60.0) is await history.recent(60.0)
    assert control.num_loads == 1
