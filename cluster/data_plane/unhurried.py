"""Does work that may wait at a low priority of the processor, so that what serves beside it goes first."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

LOW = 10  # a tenth of what others get: at 19, the lowest, a host beside busy processes took a minute to start


def unhurried(action: Callable[[], T]) -> T:
    """Run `action` in a thread of its own at a low priority, and return its result or raise what it raised.

    A thread, because only a superuser may raise a priority again that was lowered.
    """
    done: Future[T] = Future()

    def run() -> None:
        with suppress(OSError):  # threads have priorities of their own on Linux only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW)
        try:
            done.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            done.set_exception(error)

    threading.Thread(target=run, name="unhurried", daemon=True).start()
    return done.result()
