"""Asks the scheduler for short turns, so that a process of the token loop that is woken runs at once.

A token crosses between processes in every layer. Where others want the processors too, Linux lets whoever runs finish
its turn first, 1.4 to 3 ms, and a token waits for that dozens of times. Who asks for a shorter turn may interrupt; its
share stays what it was. Since Linux 6.12 (`sched_runtime` of a SCHED_OTHER thread); older kernels take no notice.
"""

import ctypes
import errno
import logging
import os
import platform
from contextlib import suppress

log = logging.getLogger(__name__)

SLICE_NS = 100_000  # the shortest there is
SYSCALLS = {"x86_64": 314, "aarch64": 274}  # sched_setattr, for which Python and glibc before 2.41 have no function


class SchedAttr(ctypes.Structure):
    """`struct sched_attr` of sched_setattr(2), version 0; policy 0 is SCHED_OTHER."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )  # fmt: skip


def take_short_slices() -> bool:
    """Shorten the turns of this process's threads and of those they start; return whether the system agreed."""
    number = SYSCALLS.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            attr = SchedAttr(size=ctypes.sizeof(SchedAttr), nice=nice, runtime=SLICE_NS)
            if call(number, thread, ctypes.byref(attr), 0) and ctypes.get_errno() != errno.ESRCH:
                log.info("short_slices_refused error=%s", os.strerror(ctypes.get_errno()))
                return False
    return True
