"""Where the time of a step goes: nanoseconds by station, summed within a step and then counted into a histogram.

A step is measured by marks, not by pairs: `begin` starts the clock, and each `mark` gives the time since the last one
to a station, so nothing is counted twice or left out. A mark costs about a tenth of a microsecond; there are a few per
layer and none per token. One thread writes; others read single numbers, which may be a step old.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from time import perf_counter_ns

NAMES = ("schedule", "attention", "route", "expert", "dispatch_wait", "combine", "other", "sample", "model")
SCHEDULE, ATTENTION, ROUTE, EXPERT, DISPATCH_WAIT, COMBINE, OTHER, SAMPLE, MODEL = range(len(NAMES))
# Upper bounds of the buckets in seconds, 1-2-5; what is above the last falls into one more.
BOUNDS_S = tuple(digit * 10.0**power for power in range(-5, 1) for digit in (1, 2, 5))
BOUNDS_NS = tuple(round(bound_s * 1e9) for bound_s in BOUNDS_S)


class Stations:
    """Times of one engine's steps. `schedule` is planning, `attention` attention with its norms and projections,
    `route` the router and sending rows away, `expert` the experts computed in this process, the shared one among them,
    `dispatch_wait` waiting for rows with nothing to do, `combine` taking replies and adding them up, `other` the rest
    of the forward pass, `sample` drawing tokens; `model` is the whole forward pass.
    """

    __slots__ = ("_last_ns", "num_steps", "step_ns", "steps_by_bucket", "sums_ns")

    def __init__(self) -> None:
        self.step_ns = [0] * len(NAMES)  # of the step that runs
        self.sums_ns = [0] * len(NAMES)
        self.steps_by_bucket = [[0] * (len(BOUNDS_NS) + 1) for _ in NAMES]
        self.num_steps = 0
        self._last_ns = 0

    def begin(self) -> None:
        """Start the clock: what was before belongs to nobody."""
        self._last_ns = perf_counter_ns()

    def mark(self, station: int) -> None:
        """Give the time since the last mark to a station."""
        now_ns = perf_counter_ns()
        self.step_ns[station] += now_ns - self._last_ns
        self._last_ns = now_ns

    def add(self, station: int, nanoseconds: int) -> None:
        """Give a time that somebody else measured to a station."""
        self.step_ns[station] += nanoseconds

    def end_step(self) -> None:
        """Count the step; a station that it did not touch is not counted."""
        self.num_steps += 1
        for station, taken_ns in enumerate(self.step_ns):
            if taken_ns > 0:
                self.sums_ns[station] += taken_ns
                self.steps_by_bucket[station][bisect_left(BOUNDS_NS, taken_ns)] += 1
            self.step_ns[station] = 0

    def seconds(self) -> dict[str, float]:
        """Return the sums by station."""
        return {name: total_ns / 1e9 for name, total_ns in zip(NAMES, self.sums_ns, strict=True)}

    def steps(self) -> dict[str, int]:
        """Return the filled buckets, flat so that they add up over engines: "attention/3" is its fourth bucket."""
        return {
            f"{name}/{place}": number
            for name, numbers in zip(NAMES, self.steps_by_bucket, strict=True)
            for place, number in enumerate(numbers)
            if number
        }


class NotMeasured(Stations):
    """Measures nothing, for a model that no engine steps and for the comparison with one that measures."""

    __slots__ = ()

    def begin(self) -> None:
        """Start no clock."""

    def mark(self, station: int) -> None:
        """Look at no clock."""

    def add(self, station: int, nanoseconds: int) -> None:
        """Add nothing."""

    def end_step(self) -> None:
        """Count nothing."""


def buckets(steps: Mapping[str, int], name: str) -> Sequence[int]:
    """Return the numbers of one station's buckets out of the flat mapping, the one above all bounds last."""
    return [steps.get(f"{name}/{place}", 0) for place in range(len(BOUNDS_S) + 1)]
