"""Puts together what is to be known of a history: promises broken, waits, faults, operations; prints nothing."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama4_dist.chaos.history import stalls
from llama4_dist.chaos.history.answers import judge_requests
from llama4_dist.chaos.history.events import FORMAT, Event, EventKind, seeds
from llama4_dist.chaos.history.reference import Reference
from llama4_dist.chaos.history.requests import Violation


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a run must keep beyond what every run must: defaults demand nothing more and excuse nothing."""

    allowed_errors: frozenset[str] = frozenset()
    required_phases: tuple[str, ...] = ()
    max_added_stall_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A change of the cluster; `seconds` is None if it never ended."""

    number: int
    name: str
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Everything the checker found. `added_stall` is of gaps that overlap a fault, less the fault-free p99."""

    seeds: Sequence[int]
    violations: Sequence[Violation]
    outcomes: Mapping[str, int]
    num_tokens: int
    num_compared: int  # requests the reference knows
    first_token: stalls.Summary
    gaps: stalls.Summary
    healthy_gaps: stalls.Summary
    fault_gaps: stalls.Summary
    added_stall: stalls.Summary
    longest_gaps: Mapping[str, float]  # by request
    faults: Sequence[stalls.FaultEffect]
    phases: Mapping[str, int]
    operations: Sequence[Operation]
    num_epochs: int

    @property
    def has_passed(self) -> bool:
        return not self.violations

    def as_json(self) -> dict[str, Any]:
        """Return it as plain objects."""
        return {"format": FORMAT, "passed": self.has_passed} | asdict(self)


def judge(events: Sequence[Event], reference: Reference | None, rules: Rules) -> Verdict:
    """Judge a history against a reference; None compares no tokens."""
    outcomes, violations = judge_requests(events, reference, rules.allowed_errors)
    gaps, faults = stalls.gaps_of(events), stalls.fault_windows(events)
    fault_gaps = stalls.during(gaps, faults)
    overlapping = set(fault_gaps)
    quiet = stalls.gaps_of(reference.events) if reference and reference.events else gaps
    healthy = stalls.summary(gap.length_s for gap in quiet if quiet is not gaps or gap not in overlapping)
    added = stalls.summary(max(0.0, gap.length_s - healthy.p99_s) for gap in fault_gaps)
    phases, operations = stalls.by_phase(faults), operations_of(events)
    longest: dict[str, float] = {}
    for gap in gaps:
        longest[gap.request_id] = max(longest.get(gap.request_id, 0.0), gap.length_s)
    return Verdict(
        seeds=seeds(events),
        violations=[*violations, *judge_run(events, faults, phases, operations, rules, added)],
        outcomes=dict(outcomes),
        num_tokens=sum(event.kind is EventKind.TOKEN for event in events),
        num_compared=num_compared(events, reference),
        first_token=stalls.summary(stalls.first_waits(events)),
        gaps=stalls.summary(gap.length_s for gap in gaps),
        healthy_gaps=healthy,
        fault_gaps=stalls.summary(gap.length_s for gap in fault_gaps),
        added_stall=added,
        longest_gaps=longest,
        faults=[stalls.effect(fault, gaps, healthy=healthy) for fault in faults],
        phases=dict(phases),
        operations=operations,
        num_epochs=sum(event.kind is EventKind.EPOCH for event in events),
    )


def judge_run(
    events: Sequence[Event],
    faults: Iterable[stalls.FaultWindow],
    phases: Collection[str],
    operations: Iterable[Operation],
    rules: Rules,
    added: stalls.Summary,
) -> list[Violation]:
    """List what was wrong with the run as a whole."""
    found = [
        Violation(kind="unverified_fault", request_id="", detail=f"{fault.number} {fault.name} did not take hold")
        for fault in faults
        if not fault.is_verified
    ]
    found += [
        Violation(kind="open_operation", request_id="", detail=f"{one.number} {one.name} never ended")
        for one in operations
        if one.seconds is None
    ]
    found += [
        Violation(kind="phase_missing", request_id="", detail=f"no verified fault fell into phase {phase!r}")
        for phase in rules.required_phases
        if phase not in phases
    ]
    if rules.max_added_stall_s is not None and added.max_s > rules.max_added_stall_s:
        detail = f"a fault added {added.max_s:.3f} s to a gap; {rules.max_added_stall_s} s are allowed"
        found.append(Violation(kind="stall", request_id="", detail=detail))
    if not any(event.kind is EventKind.SUBMITTED for event in events):
        found.append(Violation(kind="empty", request_id="", detail="the history holds no request: it proves nothing"))
    return found


def operations_of(events: Sequence[Event]) -> list[Operation]:
    """List the operations of a history."""
    ended_s = {event.extra.get("number"): event.t_s for event in events if event.kind is EventKind.OPERATION_ENDED}
    return [
        Operation(
            number=int(event.extra.get("number", 0)),
            name=str(event.extra.get("name", "")),
            seconds=ended_s[number] - event.t_s if (number := event.extra.get("number")) in ended_s else None,
        )
        for event in events
        if event.kind is EventKind.OPERATION_STARTED
    ]


def num_compared(events: Iterable[Event], reference: Reference | None) -> int:
    """Count the requests that the reference knows."""
    if reference is None:
        return 0
    asked = {one.request_id: one for one in events if one.kind is EventKind.SUBMITTED}
    return sum(reference.of(one.prompt or (), one.sampling or {}) is not None for one in asked.values())
