"""The format of a history: one JSON object a line, in the order of time; knows no rule about what may follow what.

Every line holds `format`, `t` (monotonic seconds of the machine), `seed` of the run and `event`. Lines of requests add
`request_id` and `attempt`; `submitted` the prompt (text or token ids) and the sampling; `started` the `position` from
which this attempt delivers; `token` its `index` (which of the `n` sequences), `position` and `token_id`; `finished` its
`index`. The rest is `extra`: `reason` and `message` of an error, `finish_reason`, `number`, `name` and `phase` of a
fault, `number` and `name` of an operation, `epoch`.
"""

import heapq
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

FORMAT = 1
READABLE = (1,)


class HistoryError(Exception):
    """A history or reference that cannot be read; the message names the file and the line."""


class EventKind(StrEnum):
    """What happened."""

    SUBMITTED = "submitted"
    STARTED = "started"
    TOKEN = "token"  # noqa: S105 - one of a text, not a secret
    FINISHED = "finished"
    ERROR = "error"
    CANCELLED = "cancelled"
    FAULT_INJECTED = "fault_injected"
    FAULT_VERIFIED = "fault_verified"
    FAULT_HEALED = "fault_healed"
    OPERATION_STARTED = "operation_started"
    OPERATION_ENDED = "operation_ended"
    EPOCH = "epoch"


OF_REQUESTS = frozenset(list(EventKind)[:6])


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line."""

    t_s: float
    seed: int
    kind: EventKind
    request_id: str = ""
    attempt: int = 0
    index: int | None = None
    position: int | None = None
    token_id: int | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Return the event as it stands in a file, with its line end; what is absent is left out."""
        shown: dict[str, Any] = {"format": FORMAT, "t": self.t_s, "seed": self.seed, "event": self.kind}
        if self.kind in OF_REQUESTS:
            shown |= {"request_id": self.request_id, "attempt": self.attempt}
        rest = {name: getattr(self, name) for name in ("index", "position", "token_id", "prompt", "sampling")}
        shown |= {name: value for name, value in rest.items() if value is not None}
        return json.dumps(shown | ({"extra": self.extra} if self.extra else {}), separators=(",", ":")) + "\n"


def parse(line: str, where: str) -> Event:
    """Read one line; HistoryError names `where` it stands."""
    try:
        shown = json.loads(line)
        if shown["format"] not in READABLE:
            raise HistoryError(f"{where}: format {shown['format']} is not one of {READABLE}: use its own checker")
        prompt = shown.get("prompt")
        event = Event(
            t_s=float(shown["t"]),
            seed=int(shown["seed"]),
            kind=EventKind(shown["event"]),
            request_id=str(shown.get("request_id", "")),
            attempt=int(shown.get("attempt", 0)),
            index=shown.get("index"),
            position=shown.get("position"),
            token_id=shown.get("token_id"),
            prompt=tuple(prompt) if isinstance(prompt, list) else prompt,
            sampling=shown.get("sampling"),
            extra=shown.get("extra", {}),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise HistoryError(f"{where}: no event of a history ({error!r})") from error
    needed: dict[EventKind, tuple[str, ...]] = {
        EventKind.SUBMITTED: ("prompt", "sampling"),
        EventKind.TOKEN: ("index", "position", "token_id"),
        EventKind.FINISHED: ("index",),
    }
    if missing := [name for name in needed.get(event.kind, ()) if getattr(event, name) is None]:
        raise HistoryError(f"{where}: {event.kind} without {', '.join(missing)}")
    if event.kind in OF_REQUESTS and not event.request_id:
        raise HistoryError(f"{where}: {event.kind} without request_id")
    return event


def read_history(paths: Sequence[Path]) -> list[Event]:
    """Read the files of one run, merged by time; a last line that its writer could not finish is dropped."""
    return list(heapq.merge(*(read_file(path) for path in paths), key=lambda event: event.t_s))


def read_file(path: Path) -> list[Event]:
    """Read one file; a file whose time runs backwards was not written by a recorder, and is refused."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HistoryError(f"{path}: {error}") from error
    whole, _, _ = text.rpartition("\n")
    events = [parse(line, f"{path}:{number}") for number, line in enumerate(whole.splitlines(), 1)]
    for number, (earlier, later) in enumerate(itertools.pairwise(events), 2):
        if later.t_s < earlier.t_s:
            raise HistoryError(f"{path}:{number}: time runs backwards, from {earlier.t_s} to {later.t_s}")
    return events


def reference_key(prompt: str | Sequence[int], sampling: Mapping[str, Any]) -> str:
    """Return what two requests share if they must get the same tokens."""
    return json.dumps([prompt if isinstance(prompt, str) else list(prompt), dict(sorted(sampling.items()))])


def seeds(events: Iterable[Event]) -> list[int]:
    """List the seeds of the run, to replay it."""
    return sorted({event.seed for event in events})
