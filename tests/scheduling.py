"""What the scheduler of Linux was told about a thread."""

import ctypes
import platform

import pytest

from cluster.data_plane.short_slices import SchedAttr

GET = {"x86_64": 315, "aarch64": 275}  # sched_getattr


def slice_ns(thread: int) -> int:
    """Return how long its turns are; 0 where the system does not tell."""
    number = GET.get(platform.machine())
    attr = SchedAttr()
    if number is None or platform.system() != "Linux":
        return 0
    if ctypes.CDLL(None, use_errno=True).syscall(number, thread, ctypes.byref(attr), ctypes.sizeof(attr), 0):
        raise OSError(ctypes.get_errno(), f"sched_getattr of thread {thread}")
    return int(attr.runtime)


needs_slices = pytest.mark.skipif(slice_ns(0) == 0, reason="turns can be shortened since Linux 6.12")
