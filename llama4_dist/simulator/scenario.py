"""What happens to a simulated cluster: deaths and changes of size at given times; read and checked here."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama4_dist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`kill` takes host `value` away at `at_s`; `scale` brings the hosts to `value`."""

    at_s: float
    kind: str
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A run: its length, its events, and how long recovery's parts take.

    `detect_s` is from a death to rows being sent again; `respawn_s` starts a process, without its weights; `source` is
    where weights come from (`planner.recovery`).
    """

    duration_s: float
    events: tuple[Event, ...] = ()
    detect_s: float = 0.02
    respawn_s: float = 10.0
    source: str = "peer"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("duration_s", "detect_s", "respawn_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1e6):
                raise ConfigError(f"{name}={value} must be from 0 to 1,000,000 seconds")


def parse_events(given: Sequence[str], num_hosts: int) -> tuple[Event, ...]:
    """Read `kill:HOST@SECONDS` and `scale:HOSTS@SECONDS`, sorted by time; ConfigError names a wrong one."""
    events = []
    for one in given:
        found = re.fullmatch(r"\s*(kill|scale):([0-9]{1,6})@([0-9]{1,7}(?:\.[0-9]{1,6})?)s?\s*", one)
        if found is None:
            raise ConfigError(f"event {one!r}: give kill:HOST@SECONDS or scale:HOSTS@SECONDS, e.g. kill:3@20")
        event = Event(at_s=float(found[3]), kind=found[1], value=int(found[2]))
        if event.kind == "kill" and event.value >= num_hosts:
            raise ConfigError(f"event {one!r}: hosts are numbered from 0 to {num_hosts - 1}")
        if event.kind == "scale" and event.value < 1:
            raise ConfigError(f"event {one!r}: at least one host must stay")
        events.append(event)
    return tuple(sorted(events, key=lambda event: event.at_s))
