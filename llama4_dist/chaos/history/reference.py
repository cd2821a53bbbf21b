"""What requests should have been answered: from a fault-free history, or a JSON file; knows no run under faults."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_dist.chaos.history.events import Event, EventKind, HistoryError, parse, read_file, reference_key
from llama4_dist.chaos.history.requests import judge_end, read_requests

Sequences = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The tokens of each sequence by prompt and sampling, and the events they came from, if they are of a history."""

    tokens: Mapping[str, Sequences]
    events: Sequence[Event] = ()

    def of(self, prompt: str | Sequence[int], sampling: Mapping[str, Any]) -> Sequences | None:
        """Return the tokens of a request's sequences; None if the reference does not know it."""
        return self.tokens.get(reference_key(prompt, sampling))


def read_reference(path: Path) -> Reference:
    """Read a fault-free history, or {key: tokens, or a list of tokens for each sequence}."""
    if is_history(path):
        events = read_file(path)
        return Reference(tokens=tokens_of(events, str(path)), events=events)
    try:
        entries = json.loads(path.read_text()).items()
        return Reference(tokens={key: sequences(value) for key, value in entries})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise HistoryError(f"{path}: neither a history nor an object from keys to tokens ({error!r})") from error


def is_history(path: Path) -> bool:
    """Tell by the first line."""
    try:
        with path.open() as file:
            parse(file.readline(), str(path))
    except (OSError, UnicodeDecodeError, HistoryError):
        return False
    return True


def sequences(value: Any) -> Sequences:
    """Read tokens of one sequence, or of several."""
    several = value if value and isinstance(value[0], list) else [value]
    return tuple(tuple(int(token) for token in tokens) for tokens in several)


def tokens_of(events: Sequence[Event], name: str) -> dict[str, Sequences]:
    """Collect the tokens of a run's requests; HistoryError if a fault fell into it, or it broke a promise itself."""
    faults = [event.extra.get("name") for event in events if event.kind is EventKind.FAULT_INJECTED]
    if faults:
        raise HistoryError(f"{name}: a reference is a run without faults; this one has {faults[0]}")
    found: dict[str, Sequences] = {}
    for request in read_requests(events):
        judge_end(request)
        if request.violations:
            raise HistoryError(f"{name}: no reference, for it broke a promise itself: {request.violations[0]}")
        if request.end is not None:
            continue  # cancelled: nobody knows what it would have said
        said = tuple(tuple(request.tokens[index].values()) for index in range(request.num_sequences))
        if found.setdefault(reference_key(request.prompt, request.sampling), said) != said:
            raise HistoryError(f"{name}: {request.request_id} and an equal request got different tokens")
    return found
