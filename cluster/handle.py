"""A process of the cluster as its caller sees it, and waiting for several of them; knows no Ray."""

import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Protocol

from cluster.worker import Role
from llama4_dist.errors import UnavailableError

PROGRESS_INTERVAL_S = 0.25


class Handle(Protocol):
    """A worker or the controller, wherever it runs."""

    worker: str
    role: Role

    def call(self, method: str, *arguments: object) -> Future[Any]: ...
    def kill(self) -> None: ...


def settled(calls: Mapping[Handle, Future[Any]], timeout_s: float) -> bool:
    """Wait a little; say whether all calls are done or one failed."""
    done, pending = wait(calls.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    return not pending or any(call.exception() for call in done)


def results(calls: Mapping[Handle, Future[Any]], deadline: float, *, doing: str) -> dict[str, Any]:
    """Return the answers by worker, or raise the first failure as soon as it happens."""
    timeout_s = max(0.0, deadline - time.monotonic())
    done, pending = wait(calls.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for call in done:
        if (error := call.exception()) is not None:
            raise error
    if pending:
        late = sorted(handle.worker for handle, call in calls.items() if call in pending)
        raise UnavailableError(f"{', '.join(late)} did not {doing} in time: see the logs there")
    return {handle.worker: call.result() for handle, call in calls.items()}
