"""Measures what clients waited: gaps between tokens, and those that faults made; judges nothing."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llama4_dist.chaos.history.events import Event, EventKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The time between two deliveries of one sequence; tokens that came together have none between them."""

    request_id: str
    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Some durations, in seconds; zeros if there are none."""

    count: int
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultWindow:
    """One fault, from its injection to its healing; `healed_s` is the history's end if it was not healed."""

    number: int
    name: str
    phase: str
    injected_s: float
    healed_s: float
    is_verified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultEffect:
    """What a fault cost. `recovery_s`: from injection to the end of the last stall it overlaps, 0 if none does."""

    fault: FaultWindow
    num_stalled: int
    recovery_s: float
    worst_added_s: float


def summary(lengths_s: Iterable[float]) -> Summary:
    """Summarise durations by nearest rank."""
    ordered = sorted(lengths_s)
    if not ordered:
        return Summary(count=0, p50_s=0.0, p99_s=0.0, max_s=0.0)

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Summary(count=len(ordered), p50_s=rank(0.5), p99_s=rank(0.99), max_s=ordered[-1])


def gaps_of(events: Iterable[Event]) -> list[Gap]:
    """List the gaps of all sequences, over all attempts; tokens given again by a later attempt are no delivery."""
    last_s: dict[tuple[str, int | None], float] = {}
    num_given: dict[tuple[str, int | None], int] = {}
    gaps = []
    for event in events:
        key, position = (event.request_id, event.index), event.position or 0
        if event.kind is not EventKind.TOKEN or position < num_given.get(key, 0):
            continue
        if event.t_s > last_s.get(key, event.t_s):
            gaps.append(Gap(request_id=event.request_id, begin_s=last_s[key], end_s=event.t_s))
        last_s[key], num_given[key] = event.t_s, position + 1
    return gaps


def first_waits(events: Iterable[Event]) -> list[float]:
    """List how long requests waited for their first token, from their first submission."""
    submitted_s: dict[str, float] = {}
    waits_s: dict[str, float] = {}
    for event in events:
        if event.kind is EventKind.SUBMITTED:
            submitted_s.setdefault(event.request_id, event.t_s)
        elif event.kind is EventKind.TOKEN and event.request_id in submitted_s:
            waits_s.setdefault(event.request_id, event.t_s - submitted_s[event.request_id])
    return list(waits_s.values())


def fault_windows(events: Sequence[Event]) -> list[FaultWindow]:
    """List the faults of a history."""
    numbers = {
        kind: {event.extra.get("number"): event.t_s for event in events if event.kind is kind}
        for kind in (EventKind.FAULT_VERIFIED, EventKind.FAULT_HEALED)
    }
    return [
        FaultWindow(
            number=int(event.extra.get("number", 0)),
            name=str(event.extra.get("name", "")),
            phase=str(event.extra.get("phase", "")),
            injected_s=event.t_s,
            healed_s=numbers[EventKind.FAULT_HEALED].get(event.extra.get("number"), events[-1].t_s),
            is_verified=event.extra.get("number") in numbers[EventKind.FAULT_VERIFIED],
        )
        for event in events
        if event.kind is EventKind.FAULT_INJECTED
    ]


def overlaps(gap: Gap, fault: FaultWindow) -> bool:
    """Whether a gap and a fault share a moment."""
    return gap.begin_s <= fault.healed_s and gap.end_s >= fault.injected_s


def during(gaps: Iterable[Gap], faults: Sequence[FaultWindow]) -> list[Gap]:
    """List the gaps that overlap any fault."""
    return [gap for gap in gaps if any(overlaps(gap, fault) for fault in faults)]


def effect(fault: FaultWindow, gaps: Iterable[Gap], *, healthy: Summary) -> FaultEffect:
    """Attribute to a fault the gaps that overlap it and are longer than any without faults."""
    stalls = [gap for gap in gaps if overlaps(gap, fault) and gap.length_s > healthy.max_s]
    return FaultEffect(
        fault=fault,
        num_stalled=len({gap.request_id for gap in stalls}),
        recovery_s=max((gap.end_s - fault.injected_s for gap in stalls), default=0.0),
        worst_added_s=max((gap.length_s - healthy.p99_s for gap in stalls), default=0.0),
    )


def by_phase(faults: Iterable[FaultWindow]) -> Counter[str]:
    """Count verified faults by the phase they fell into."""
    return Counter(fault.phase or "unnamed" for fault in faults if fault.is_verified)
