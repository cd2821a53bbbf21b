"""Waits for what workers were asked until it is cancelled, one of them fails or time is over; asks nobody itself."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from cluster.control_plane.members import seconds_until
from cluster.handle import PROGRESS_INTERVAL_S, Handle
from llama4_dist.errors import UnavailableError


class WorkerLostError(UnavailableError):
    """A worker died while it was asked."""

    reason = "WORKER_LOST"

    def __init__(self, worker: str, message: str) -> None:
        super().__init__(message)
        self.worker = worker


def follow(
    calls: Mapping[Handle, Future[Any]],
    doing: str,
    *,
    timeout_s: float,
    check: Callable[[], None],
    done: Callable[[str], None] = lambda worker: None,
    spared: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Return answers by worker once all have come; `done` is told of each, `check` raises to stop waiting.

    Raises the first failure; WorkerLostError for a worker that died, unless `spared` takes note of it; UnavailableError
    (TIMEOUT) naming those that did not `doing` in time.
    """
    deadline = time.monotonic() + timeout_s
    open_calls = {call: handle.worker for handle, call in calls.items()}
    answers: dict[str, Any] = {}
    while open_calls:
        check()
        for call in wait(open_calls, timeout=PROGRESS_INTERVAL_S, return_when=FIRST_COMPLETED).done:
            worker = open_calls.pop(call)
            try:
                answers[worker] = call.result()
            except UnavailableError as error:
                if error.reason != "WORKER_LOST":
                    raise
                if spared is None:
                    raise WorkerLostError(worker, error.message) from None
                spared(worker)
            else:
                done(worker)
        if open_calls and seconds_until(deadline) == 0.0:
            late = ", ".join(sorted(open_calls.values()))
            raise UnavailableError(f"{late} did not {doing} in {timeout_s:.0f} s", reason="TIMEOUT")
    return answers
