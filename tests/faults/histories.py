"""Histories made up for the checker: good ones at random, and every way to spoil one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

from llama4_dist.chaos.history.events import Event, EventKind, reference_key
from llama4_dist.chaos.history.reference import Reference

Events = list[Event]
Spoil = Callable[[Events, Random], Events | None]


def right_tokens(prompt: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    """What sequence `index` of this prompt must say; no two neighbours are alike."""
    return tuple(100 * prompt[0] + 10 * index + 7 * position for position in range(count))


def attempts_of(random: Random, request_id: str) -> list[Events]:
    """One request that finishes, perhaps after failed attempts that were each resumed where they ended."""
    n, count, prompt = random.choice((1, 1, 2)), random.randint(1, 8), (random.randint(0, 5), n_th(request_id))
    sampling: dict[str, Any] = {"max_tokens": count} | ({"n": n} if n > 1 else {})
    starts = sorted(random.sample(range(1, count), random.randint(0, min(2, count - 1)))) if n == 1 else []
    bounds = [0, *starts, count]
    attempts = []
    for number, (first, stop) in enumerate(pairwise(bounds)):
        who: dict[str, Any] = {"t_s": 0.0, "seed": 1, "request_id": request_id, "attempt": number}
        events = [Event(kind=EventKind.SUBMITTED, prompt=prompt, sampling=sampling, **who)]
        events.append(Event(kind=EventKind.STARTED, position=first, **who))
        for position in range(first, stop):
            for index in range(n):
                token_id = right_tokens(prompt, index, count)[position]
                events.append(Event(kind=EventKind.TOKEN, index=index, position=position, token_id=token_id, **who))
        if stop == count and number == len(bounds) - 2:
            events += [Event(kind=EventKind.FINISHED, index=index, **who) for index in range(n)]
        else:
            events.append(Event(kind=EventKind.ERROR, extra={"reason": "LOST"}, **who))
        attempts.append(events)
    return attempts


def n_th(request_id: str) -> int:
    return int(request_id.removeprefix("r"))


def good_history(random: Random) -> Events:
    """Several requests that run at once."""
    waiting = [
        [event for attempt in attempts_of(random, f"r{number}") for event in attempt]
        for number in range(random.randint(1, 4))
    ]
    events: Events = []
    while waiting:
        events.append(random.choice(waiting).pop(0))
        waiting = [one for one in waiting if one]
    return timed(events)


def timed(events: Sequence[Event]) -> Events:
    """Give each event a moment of its own."""
    return [replace(event, t_s=number / 1000) for number, event in enumerate(events)]


def reference_for(events: Sequence[Event]) -> Reference:
    """The right answers to all requests of a history."""
    return Reference(
        tokens={
            reference_key(event.prompt or (), event.sampling or {}): tuple(
                right_tokens(list(event.prompt or ()), index, (event.sampling or {})["max_tokens"])  # type: ignore[arg-type]
                for index in range((event.sampling or {}).get("n", 1))
            )
            for event in events
            if event.kind is EventKind.SUBMITTED
        }
    )


def pick(events: Events, random: Random, *kinds: EventKind) -> int | None:
    """The place of some event of these kinds."""
    places = [place for place, event in enumerate(events) if event.kind in kinds]
    return random.choice(places) if places else None


def drop(*kinds: EventKind) -> Spoil:
    def spoil(events: Events, random: Random) -> Events | None:
        place = pick(events, random, *kinds)
        return None if place is None else events[:place] + events[place + 1 :]

    return spoil


def repeat(*kinds: EventKind) -> Spoil:
    """The same again, at any later moment."""

    def spoil(events: Events, random: Random) -> Events | None:
        place = pick(events, random, *kinds)
        if place is None:
            return None
        later = random.randint(place + 1, len(events))
        return [*events[:later], events[place], *events[later:]]

    return spoil


def change(kind: EventKind, **changes: Callable[[int], int]) -> Spoil:
    def spoil(events: Events, random: Random) -> Events | None:
        place = pick(events, random, kind)
        if place is None:
            return None
        fields = {name: alter(getattr(events[place], name)) for name, alter in changes.items()}
        return [*events[:place], replace(events[place], **fields), *events[place + 1 :]]  # type: ignore[arg-type]

    return spoil


def swap_tokens(events: Events, random: Random) -> Events | None:
    """Two neighbouring tokens of one sequence change places."""
    pairs = [
        (place, later)
        for place, event in enumerate(events)
        if event.kind is EventKind.TOKEN and (later := next_token(events, place)) is not None
    ]
    if not pairs:
        return None
    first, second = random.choice(pairs)
    swapped = list(events)
    swapped[first], swapped[second] = events[second], events[first]
    return swapped


def next_token(events: Events, place: int) -> int | None:
    this = events[place]
    for later in range(place + 1, len(events)):
        one = events[later]
        if (one.request_id, one.attempt, one.index) == (this.request_id, this.attempt, this.index):
            return later if one.kind is EventKind.TOKEN else None
    return None


def token_after_end(events: Events, random: Random) -> Events | None:
    """One token more, after the end."""
    place = pick(events, random, EventKind.FINISHED)
    if place is None:
        return None
    given = [one for one in events if one.kind is EventKind.TOKEN and one.request_id == events[place].request_id]
    last = [one for one in given if one.index == events[place].index][-1]
    return [*events, replace(last, position=(last.position or 0) + 1)]


END = (EventKind.FINISHED, EventKind.ERROR, EventKind.CANCELLED)
SPOILS: dict[str, Spoil] = {
    "a lost token": drop(EventKind.TOKEN),
    "a token twice": repeat(EventKind.TOKEN),
    "swapped tokens": swap_tokens,
    "a wrong token": change(EventKind.TOKEN, token_id=lambda token: token + 1),
    "a wrong position": change(EventKind.TOKEN, position=lambda position: position + 1),
    "a token of another sequence": change(EventKind.TOKEN, index=lambda index: index + 1),
    "a token of another attempt": change(EventKind.TOKEN, attempt=lambda attempt: attempt + 1),
    "a missing end": drop(*END),
    "two ends": repeat(*END),
    "a token after the end": token_after_end,
    "no submission": drop(EventKind.SUBMITTED),
    "two submissions": repeat(EventKind.SUBMITTED),
    "a wrong start": change(EventKind.STARTED, position=lambda position: position + 1),
}
