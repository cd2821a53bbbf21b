"""The operations of one controller: one at a time, named, idempotent by request id. It carries nothing out."""

import threading
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.operation import ChangeOptions, Kind, Operation, Phase
from llama4_dist.errors import (
    ConflictError,
    DuplicateRequestError,
    Llama4Error,
    NotFoundError,
    PreconditionError,
    RequestCancelledError,
)

MAX_KEPT = 64  # ended operations
TOO_LATE = (Phase.COMMITTING, Phase.DRAINING)
CANCELLED_TOO_LATE = "asked to cancel when the new epoch was being published: too late, it goes on"


@dataclass(slots=True)
class _Entry:
    operation: Operation
    asked: Hashable  # kind and arguments
    cancelled: threading.Event = field(default_factory=threading.Event)


class OperationLedger:
    """Thread-safe. `prefix` makes names unique among controllers."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._entries: dict[str, _Entry] = {}  # oldest first
        self._num_begun = 0
        self.num_ended: Counter[tuple[Kind, Phase]] = Counter()  # since this controller began

    @property
    def running(self) -> str:
        """Name of the operation under way, "" if none."""
        with self._lock:
            return self._running()

    @property
    def under_way(self) -> tuple[Kind, Phase] | None:
        """Kind and phase of the operation under way."""
        with self._lock:
            name = self._running()
            return (self._entries[name].operation.kind, self._entries[name].operation.phase) if name else None

    def repeated(self, kind: Kind, asked: Hashable, request_id: str) -> Operation | None:
        """Return the operation that this request began before; DuplicateRequestError if that one asked otherwise."""
        with self._lock:
            for entry in self._entries.values():
                if request_id and entry.operation.request_id == request_id:
                    if entry.asked != (kind, asked):
                        raise DuplicateRequestError(
                            f"request id {request_id} began {entry.operation.name}, which asked for something else: "
                            "choose another id"
                        )
                    return entry.operation
        return None

    def check_free(self) -> None:
        """Raise ConflictError, naming the operation under way, if there is one."""
        with self._lock:
            self._check_free()

    def begin(self, kind: Kind, asked: Hashable, options: ChangeOptions) -> Operation:
        """Begin an operation; ConflictError while another one runs."""
        with self._lock:
            self._check_free()
            self._num_begun += 1
            operation = Operation(
                name=f"operations/{self._prefix}-{self._num_begun}",
                kind=kind,
                phase=Phase.PLANNING,
                request_id=options.request_id,
                started_s=time.time(),
            )
            self._entries[operation.name] = _Entry(operation, (kind, asked))
            while len(self._entries) > MAX_KEPT:
                del self._entries[next(iter(self._entries))]
            return operation

    def update(self, name: str, **changes: Any) -> Operation:
        """Note progress of the operation under way."""
        with self._lock:
            entry = self._entries[name]
            entry.operation = replace(entry.operation, **changes)
            return entry.operation

    def enter(self, name: str, phase: Phase) -> None:
        """Note the phase that begins; RequestCancelledError instead if that was asked before it became too late."""
        with self._lock:
            entry = self._entries[name]
            _check_cancelled(entry)
            entry.operation = replace(entry.operation, phase=phase)

    def warn(self, name: str, warning: str) -> None:
        """Add a warning."""
        with self._lock:
            _warn(self._entries[name], warning)

    def end(self, name: str, error: Llama4Error | None = None) -> Operation:
        """End an operation: done, cancelled, or failed by what `error` says."""
        phase = Phase.DONE if error is None else Phase.FAILED
        if isinstance(error, RequestCancelledError):
            phase = Phase.CANCELLED
        with self._lock:
            entry = self._entries[name]
            entry.operation = replace(
                entry.operation,
                phase=phase,
                ended_s=time.time(),
                error_reason="" if error is None else error.reason,
                error_message="" if error is None else error.message,
            )
            self.num_ended[entry.operation.kind, phase] += 1
            self._ended.notify_all()
            return entry.operation

    def check_cancelled(self, name: str) -> None:
        """Raise RequestCancelledError if that was asked."""
        with self._lock:
            _check_cancelled(self._entries[name])

    def wait(self, name: str, timeout_s: float) -> Operation:
        """Return an operation when it has ended, or as it is when the time is up."""
        with self._lock:
            self._ended.wait_for(lambda: self._find(name).operation.phase.final, timeout_s)
            return self._find(name).operation

    def get(self, name: str) -> Operation:
        with self._lock:
            return self._find(name).operation

    def list(self) -> tuple[Operation, ...]:
        """Return all, newest first."""
        with self._lock:
            return tuple(entry.operation for entry in reversed(self._entries.values()))

    def cancel(self, name: str) -> None:
        """Ask for a rollback; one that commits already goes on, with a warning, and one that ended stays as it is."""
        with self._lock:
            entry = self._find(name)
            if entry.operation.phase not in TOO_LATE:
                entry.cancelled.set()
            elif CANCELLED_TOO_LATE not in entry.operation.warnings:
                _warn(entry, CANCELLED_TOO_LATE)

    def delete(self, name: str) -> None:
        """Forget an operation that has ended."""
        with self._lock:
            if not self._find(name).operation.phase.final:
                raise PreconditionError(f"{name} runs: cancel it, or wait for its end", reason="OPERATION_RUNNING")
            del self._entries[name]

    def _running(self) -> str:
        return next((name for name, entry in self._entries.items() if not entry.operation.phase.final), "")

    def _check_free(self) -> None:
        if name := self._running():
            raise ConflictError(
                f"{name} is under way: wait for it or cancel it",
                metadata={"operation": name, "resource_type": "operation", "resource_name": name},
            )

    def _find(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise NotFoundError(f"there is no operation {name!r}: `llama4-dist cluster operations` lists them")
        return entry


def _warn(entry: _Entry, warning: str) -> None:
    entry.operation = replace(entry.operation, warnings=(*entry.operation.warnings, warning))


def _check_cancelled(entry: _Entry) -> None:
    if entry.cancelled.is_set():
        raise RequestCancelledError(f"{entry.operation.name} was cancelled and rolled back")
