"""The workers a controller knows, and asking several of them at once. Decides nothing."""

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import wait
from typing import Any

from cluster.handle import Handle, results
from cluster.worker import Role, State, WorkerStatus
from llama4_dist.errors import Llama4Error, UnavailableError

STATUS_TIMEOUT_S = 5.0


class Members:
    """Handles by worker id; thread-safe. Copy on write: it may be read while another thread adds and removes."""

    def __init__(self, workers: Iterable[Handle]) -> None:
        self._changing = threading.Lock()
        self._handles: Mapping[str, Handle] = {handle.worker: handle for handle in workers}

    def __contains__(self, worker: str) -> bool:
        return worker in self._handles

    def of(self, role: Role) -> list[Handle]:
        """Return the workers of a role."""
        return [handle for handle in self._handles.values() if handle.role is role]

    @property
    def followers(self) -> list[Handle]:
        """Return the workers that follow topologies: those that send rows to expert hosts, and who leads such."""
        return [handle for handle in self._handles.values() if handle.role in (Role.ATTENTION, Role.STAGE)]

    def named(self, workers: Collection[str]) -> list[Handle]:
        """Return those of these that are known."""
        return [handle for worker, handle in self._handles.items() if worker in workers]

    @property
    def all(self) -> list[Handle]:
        return list(self._handles.values())

    def add(self, handles: Iterable[Handle]) -> None:
        """Know these too; a handle replaces the one of the same id."""
        with self._changing:
            self._handles = {**self._handles, **{handle.worker: handle for handle in handles}}

    def remove(self, workers: Collection[str]) -> None:
        """Forget these."""
        with self._changing:
            self._handles = {worker: one for worker, one in self._handles.items() if worker not in workers}

    def drop(self, handles: Iterable[Handle]) -> list[str]:
        """Forget these very processes and return their ids; a later process of the same id stays known."""
        with self._changing:
            dropped = [handle.worker for handle in handles if self._handles.get(handle.worker) is handle]
            self._handles = {worker: one for worker, one in self._handles.items() if worker not in dropped}
        return dropped

    def ask(self, workers: Iterable[Handle], method: str, *arguments: object, deadline: float) -> dict[str, Any]:
        """Call a method of each and return the answers; raises the first failure as soon as it happens."""
        return results({worker: worker.call(method, *arguments) for worker in workers}, deadline, doing=method)

    def try_each(
        self, workers: Iterable[Handle], method: str, *arguments: object, timeout_s: float = STATUS_TIMEOUT_S
    ) -> tuple[dict[str, Any], dict[str, Llama4Error]]:
        """Call a method of each; return answers and failures. One that is late fails as UnavailableError (TIMEOUT)."""
        calls = {worker.worker: worker.call(method, *arguments) for worker in workers}
        wait(calls.values(), timeout=timeout_s)
        answers: dict[str, Any] = {}
        failures: dict[str, Llama4Error] = {}
        for worker, call in calls.items():
            if not call.done():
                failures[worker] = UnavailableError(f"{worker} did not {method} in {timeout_s} s", reason="TIMEOUT")
            elif (error := call.exception()) is None:
                answers[worker] = call.result()
            else:
                failures[worker] = error if isinstance(error, Llama4Error) else UnavailableError(str(error))
        return answers, failures

    def statuses(self, timeout_s: float = STATUS_TIMEOUT_S) -> tuple[WorkerStatus, ...]:
        """Describe every worker; one that does not answer is LOST."""
        answers, _ = self.try_each(self._handles.values(), "status", timeout_s=timeout_s)
        return tuple(
            answers.get(handle.worker) or WorkerStatus(worker=handle.worker, role=handle.role, state=State.LOST)
            for handle in self._handles.values()
        )


def seconds_until(deadline: float) -> float:
    """Return what is left of a deadline, not below 0."""
    return max(0.0, deadline - time.monotonic())
