"""Decides how many expert hosts the load wants: a pure function of readings, with hysteresis. It changes nothing.

Up quickly, down slowly: the queue or busy hosts call for more at once after `up_after_s`, and fewer are wanted only
when what is left would stay below `low` for `down_after_s`. Between the two lies a band in which nothing happens.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalePolicy:
    """Bounds and thresholds. `high` and `low` are shares of time that hosts compute, mean over hosts."""

    min_hosts: int = 1
    max_hosts: int = 64
    high: float = 0.8
    low: float = 0.4
    queue_age_s: float = 2.0  # requests that wait longer call for more hosts
    up_after_s: float = 10.0
    down_after_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_hosts <= self.max_hosts:
            raise ValueError(
                f"min_hosts={self.min_hosts}, max_hosts={self.max_hosts}: give 1 or more, the smaller first"
            )
        if not 0 < self.low < self.high <= 1:
            raise ValueError(f"low={self.low}, high={self.high}: shares of time, 0 < low < high <= 1")
        if not all(seconds >= 0 for seconds in (self.queue_age_s, self.up_after_s, self.down_after_s)):
            raise ValueError("queue_age_s, up_after_s and down_after_s are seconds from 0 on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The cluster at one moment: hosts, the share of time they computed lately, how long the oldest request waits."""

    at_s: float
    num_hosts: int
    busy: float
    queue_age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """Since when readings have called for more, and since when for fewer hosts; None = they do not."""

    high_since_s: float | None = None
    low_since_s: float | None = None


def decide(policy: AutoscalePolicy, before: Pressure, reading: Reading) -> tuple[Pressure, int]:
    """Return the pressure to remember, and how many hosts there should be."""
    wants_more = reading.busy > policy.high or reading.queue_age_s > policy.queue_age_s
    num_enough = max(policy.min_hosts, math.ceil(reading.num_hosts * reading.busy / policy.low))
    wants_fewer = not wants_more and num_enough < reading.num_hosts
    pressure = Pressure(
        high_since_s=_since(wants_more, before.high_since_s, reading.at_s),
        low_since_s=_since(wants_fewer, before.low_since_s, reading.at_s),
    )
    target = min(max(reading.num_hosts, policy.min_hosts), policy.max_hosts)
    if pressure.high_since_s is not None and reading.at_s - pressure.high_since_s >= policy.up_after_s:
        more = math.ceil(reading.num_hosts * reading.busy / policy.high)
        target = min(policy.max_hosts, max(reading.num_hosts + 1, more))
        pressure = replace(pressure, high_since_s=reading.at_s)
    elif pressure.low_since_s is not None and reading.at_s - pressure.low_since_s >= policy.down_after_s:
        target = num_enough
        pressure = replace(pressure, low_since_s=reading.at_s)
    return pressure, target


def _since(wanted: bool, before_s: float | None, now_s: float) -> float | None:
    if not wanted:
        return None
    return now_s if before_s is None else before_s
