"""Records what clients are given and what is done to the servers, as it happens; judges nothing."""

import asyncio
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llama4_dist.chaos.faults.fault import Fault
from llama4_dist.chaos.history.events import Event, EventKind
from llama4_dist.client.results import Delta
from llama4_dist.errors import Llama4Error
from llama4_dist.request import Prompt, Sampling

NO_SAMPLING = Sampling()


class History:
    """A file of events that only grows; every line is with the kernel before `record` returns, in order of time."""

    def __init__(self, path: Path, *, seed: int) -> None:
        self.path, self.seed = path, seed
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def record(self, kind: EventKind, **fields: Any) -> None:
        """Append one event of now; `fields` are those of `Event`."""
        self.record_all([(kind, fields)])

    def record_all(self, events: Iterable[tuple[EventKind, Mapping[str, Any]]]) -> None:
        """Append events of one moment."""
        with self._lock:
            now_s = time.monotonic()
            lines = [Event(t_s=now_s, seed=self.seed, kind=kind, **fields).line() for kind, fields in events]
            text = "".join(lines).encode()
            while text:
                text = text[os.write(self._descriptor, text) :]

    def next_number(self) -> int:
        """Number a fault or an operation."""
        return next(self._numbers)

    @contextmanager
    def fault(self, fault: Fault, *, name: str = "", phase: str = "") -> Iterator[None]:
        """Enter a fault, with each of its steps recorded. `phase` says what the system was doing."""
        extra = {"number": self.next_number(), "name": name or type(fault).__name__, "phase": phase}
        try:
            # Recorded first: what the fault does may be seen before `inject` returns.
            self.record(EventKind.FAULT_INJECTED, extra=extra)
            fault.inject()
            fault.verify()
            self.record(EventKind.FAULT_VERIFIED, extra=extra)
            yield
        finally:
            fault.heal()
            self.record(EventKind.FAULT_HEALED, extra=extra)
        fault.verify_healed()

    @contextmanager
    def operation(self, name: str, **extra: Any) -> Iterator[None]:
        """Record an operation on the cluster; one that raises is recorded as ended, with its error."""
        extra = {"number": self.next_number(), "name": name} | extra
        self.record(EventKind.OPERATION_STARTED, extra=extra)
        try:
            yield
        except Exception as error:
            self.record(EventKind.OPERATION_ENDED, extra=extra | {"error": type(error).__name__})
            raise
        self.record(EventKind.OPERATION_ENDED, extra=extra)

    def epoch(self, epoch: int) -> None:
        """Record that a new routing table is in force."""
        self.record(EventKind.EPOCH, extra={"epoch": epoch})

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Recorder:
    """Records one attempt of one request. `first_position`: tokens before it were delivered by earlier attempts."""

    def __init__(
        self,
        history: History,
        *,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling | None,
        attempt: int = 0,
        first_position: int = 0,
    ) -> None:
        self._history, self._who = history, {"request_id": request_id, "attempt": attempt}
        self._sampling = sampling or NO_SAMPLING
        self._prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        self._first_position = first_position
        self._positions: dict[int, int] = {}
        self._finished: set[int] = set()
        self._has_started = False

    def submitted(self) -> None:
        self._record(EventKind.SUBMITTED, prompt=self._prompt, sampling=changed_fields(self._sampling))

    def delta(self, delta: Delta) -> None:
        """Record tokens, or the end of a sequence."""
        events: list[tuple[EventKind, dict[str, Any]]] = []
        if not self._has_started:
            self._has_started = True
            events.append((EventKind.STARTED, {"position": self._first_position}))
        position = self._positions.get(delta.index, self._first_position)
        for offset, token_id in enumerate(delta.token_ids):
            fields = {"index": delta.index, "position": position + offset, "token_id": token_id}
            events.append((EventKind.TOKEN, fields))
        self._positions[delta.index] = position + len(delta.token_ids)
        if delta.finish_reason is not None:
            self._finished.add(delta.index)
            extra = {"finish_reason": str(delta.finish_reason)}
            events.append((EventKind.FINISHED, {"index": delta.index, "extra": extra}))
        self._history.record_all((kind, self._who | fields) for kind, fields in events)

    def failed(self, error: BaseException) -> None:
        """Record an error; closing a stream early, from this side, is a cancellation."""
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            if len(self._finished) < self._sampling.n:
                self._record(EventKind.CANCELLED)
            return
        reason = error.reason if isinstance(error, Llama4Error) else type(error).__name__
        self._record(EventKind.ERROR, extra={"reason": reason, "message": str(error)})

    def _record(self, kind: EventKind, **fields: Any) -> None:
        self._history.record(kind, **self._who, **fields)


def recorded_stream(history: History, stream: Iterable[Delta], **about: Any) -> Iterator[Delta]:
    """Pass on a blocking stream and record it; `about` is `Recorder`'s. Close it early to cancel."""
    recorder = Recorder(history, **about)
    recorder.submitted()
    try:
        for delta in stream:
            recorder.delta(delta)
            yield delta
    except BaseException as error:
        recorder.failed(error)
        if isinstance(error, GeneratorExit) and hasattr(stream, "close"):
            stream.close()
        raise


async def recorded_async_stream(history: History, stream: AsyncIterable[Delta], **about: Any) -> AsyncIterator[Delta]:
    """Pass on an asyncio stream and record it, as `recorded_stream` does."""
    recorder = Recorder(history, **about)
    recorder.submitted()
    try:
        async for delta in stream:
            recorder.delta(delta)
            yield delta
    except BaseException as error:
        recorder.failed(error)
        if isinstance(error, GeneratorExit | asyncio.CancelledError) and hasattr(stream, "close"):
            await stream.close()
        raise


def changed_fields(sampling: Sampling) -> dict[str, Any]:
    """Return what differs from the defaults, so that a field added later does not change old keys."""
    fields = ((field.name, getattr(sampling, field.name)) for field in dataclasses.fields(Sampling))
    return {name: plain(value) for name, value in fields if value != getattr(NO_SAMPLING, name)}


def plain(value: Any) -> Any:
    """Return a sampling field as JSON would give it back."""
    if isinstance(value, tuple):
        return list(value)
    return {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else value
