"""Work at a low priority."""

import os
import threading

import pytest

from cluster.data_plane.unhurried import LOW, unhurried


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_work_runs_at_a_low_priority_and_its_caller_keeps_its_own() -> None:
    before = niceness()
    assert unhurried(niceness) == LOW
    assert niceness() == before


def test_a_result_and_an_error_come_back() -> None:
    assert unhurried(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        unhurried(lambda: 1 // 0)
