"""Waits for what other threads and processes do."""

import time
from collections.abc import Callable

PATIENCE_S = 90.0  # where nothing is claimed about time: processes start anew, on machines that may be busy
MAX_PAUSE_S = 0.05


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], object] = "", *, timeout_s: float = PATIENCE_S
) -> None:
    """Poll until the condition holds; raise AssertionError with `what`, which is asked only then, if not in time."""
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.001
    while not condition():
        if time.monotonic() > deadline_s:  # no assert: some of this runs under `python -O`
            raise AssertionError(f"not in {timeout_s} s: {what() if callable(what) else what}")
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, MAX_PAUSE_S)
