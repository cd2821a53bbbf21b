"""Follows each request through its events: every token once and in order, and one end; knows no right answer."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama4_dist.chaos.history.events import OF_REQUESTS, Event, EventKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One broken promise. `kind` is from a closed set, `detail` is for people."""

    kind: str
    request_id: str
    detail: str


@dataclass(slots=True, kw_only=True)
class Request:
    """What is known of a request while its events are read in order."""

    request_id: str
    prompt: str | tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = -1
    was_started: bool = False
    first_position: int = 0
    tokens: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    next_position: dict[int, int] = field(default_factory=dict)  # of this attempt, by index
    finished: dict[int, str] = field(default_factory=dict)  # finish reason by index, of this attempt
    end: Event | None = None  # the error or cancellation of this attempt
    violations: list[Violation] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        return int(self.sampling.get("n", 1))

    @property
    def has_ended(self) -> bool:
        return self.end is not None or len(self.finished) >= self.num_sequences

    def accuse(self, kind: str, detail: str) -> None:
        self.violations.append(Violation(kind=kind, request_id=self.request_id, detail=detail))

    def read(self, event: Event) -> None:
        """Take the next event."""
        if event.attempt < self.attempt:
            self.accuse("late", f"{event.kind} of attempt {event.attempt} after attempt {self.attempt} had begun")
        elif event.kind is EventKind.SUBMITTED:
            self._begin(event)
        elif event.attempt > self.attempt:
            self.accuse("not_submitted", f"{event.kind} of attempt {event.attempt}, which was never submitted")
        elif event.kind is EventKind.STARTED:
            self.was_started, self.first_position = True, event.position or 0
        elif event.kind is EventKind.TOKEN:
            self._token(event)
        else:
            self._end(event)

    def _begin(self, event: Event) -> None:
        if event.attempt == self.attempt:
            self.accuse("not_submitted", f"attempt {event.attempt} was submitted twice")
        if self.attempt >= 0 and self.end is None:
            state = "had finished" if self.has_ended else "had no end"
            self.accuse("lost", f"attempt {event.attempt} began, but attempt {self.attempt} {state}")
        self.attempt, self.prompt, self.sampling = event.attempt, event.prompt or (), event.sampling or {}
        self.first_position, self.next_position, self.finished, self.end = 0, {}, {}, None

    def _token(self, event: Event) -> None:
        assert event.index is not None, "the parser asks for it"
        assert event.position is not None, "the parser asks for it"
        assert event.token_id is not None, "the parser asks for it"
        index, position = event.index, event.position
        if self.end is not None or index in self.finished:
            self.accuse("after_end", f"sequence {index} got token {position} after its end")
        expected = self.next_position.get(index, self.first_position)
        if position != expected:
            self.accuse("order", f"sequence {index} got token {position} where {expected} was due")
        if position > len(self.tokens[index]):
            self.accuse("order", f"sequence {index} misses tokens {len(self.tokens[index])} to {position - 1}")
        self.was_started = True
        self.next_position[index] = position + 1
        if self.tokens[index].setdefault(position, event.token_id) != event.token_id:
            self.accuse("wrong_token", f"sequence {index} got two different tokens {position}")

    def _end(self, event: Event) -> None:
        if self.has_ended or event.index in self.finished:
            self.accuse("second_end", f"{event.kind} after the end")
        elif event.kind is EventKind.FINISHED and event.index is not None:
            self.finished[event.index] = str(event.extra.get("finish_reason", ""))
        else:
            self.end = event


def read_requests(events: Iterable[Event]) -> list[Request]:
    """Follow every request of a history through its events."""
    requests: dict[str, Request] = {}
    for event in events:
        if event.kind in OF_REQUESTS:
            requests.setdefault(event.request_id, Request(request_id=event.request_id)).read(event)
    return list(requests.values())


def judge_end(request: Request, allowed_errors: Collection[str] = ()) -> str:
    """Say how a request ended, and accuse it if that may not be."""
    if not request.has_ended:
        missing = sorted(set(range(request.num_sequences)) - set(request.finished))
        request.accuse("lost", f"sequences {missing} never ended")
        return "lost"
    if request.end is None:
        if "cancelled" in request.finished.values() and "CANCELLED" not in allowed_errors:
            request.accuse("failed", "the server cancelled it")
        return "finished"
    if request.end.kind is EventKind.CANCELLED:
        return "cancelled"
    outcome, reason = "failed" if request.was_started else "refused", str(request.end.extra.get("reason", ""))
    if reason not in allowed_errors:
        request.accuse(outcome, f"{reason}: {request.end.extra.get('message', '')}")
    return outcome
