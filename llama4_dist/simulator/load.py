"""When requests come and how long they are: drawn from a seed, or read from a trace; knows no cluster."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_dist.bench.arrivals import send_times
from llama4_dist.errors import ConfigError

MOST_REQUESTS = 200_000
MOST_TOKENS = 1 << 24
MOST_TRACE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request: when it comes, in seconds from the start, and how many tokens it brings and wants."""

    at_s: float
    prompt_len: int
    output_len: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_s) and self.at_s >= 0):
            raise ConfigError(f"at_s={self.at_s} must be 0 or more seconds")
        for name in ("prompt_len", "output_len"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MOST_TOKENS:
                raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {MOST_TOKENS}")


def draw(
    *, rate: float, duration_s: float, prompt_len: int, output_len: int, spread: float = 0.0, seed: int = 0
) -> tuple[Arrival, ...]:
    """Return a Poisson process of `rate` requests a second; lengths are uniform within `spread` of those given."""
    if not (math.isfinite(rate) and rate > 0 and math.isfinite(duration_s) and duration_s > 0):
        raise ConfigError(f"rate={rate} and duration={duration_s} must be finite and above 0")
    if not 0 <= spread < 1:
        raise ConfigError(f"spread={spread} must lie from 0 to below 1")
    expected = rate * duration_s
    if expected > MOST_REQUESTS:
        raise ConfigError(f"{expected:.0f} requests are more than {MOST_REQUESTS}: lower the rate or the duration")
    times = send_times(rate, int(expected + 6 * math.sqrt(expected) + 6), seed=seed)
    lengths = random.Random(seed + 1)  # noqa: S311 - a load, no secret

    def length(mean: int) -> int:
        return max(1, round(mean * lengths.uniform(1 - spread, 1 + spread)))

    return tuple(
        Arrival(at_s=at_s, prompt_len=length(prompt_len), output_len=length(output_len))
        for at_s in times
        if at_s < duration_s
    )


def read_trace(file: Path) -> tuple[Arrival, ...]:
    """Read JSON lines of `at_s`, `prompt_len`, `output_len`, in order of time; ConfigError names a wrong line."""
    try:
        if file.stat().st_size > MOST_TRACE_BYTES:
            raise ConfigError(f"trace {file} is larger than {MOST_TRACE_BYTES >> 20} MiB: cut it")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read trace {file}: {error}") from None
    arrivals = [_arrival(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not 1 <= len(arrivals) <= MOST_REQUESTS:
        raise ConfigError(f"trace {file} holds {len(arrivals)} requests: give from 1 to {MOST_REQUESTS}")
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at_s))


def check_fits(arrivals: Sequence[Arrival], longest: int) -> None:
    """Refuse requests that no group's cache, or the model, can hold."""
    most = max(arrival.prompt_len + arrival.output_len for arrival in arrivals)
    if most > longest:
        raise ConfigError(f"a request of {most} tokens does not fit a group's context of {longest}: shorten it")


def _arrival(number: int, line: str) -> Arrival:
    try:
        fields: Any = json.loads(line)
        return Arrival(at_s=float(fields["at_s"]), prompt_len=fields["prompt_len"], output_len=fields["output_len"])
    except (ValueError, TypeError, KeyError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"trace line {number}: {error}; give at_s, prompt_len and output_len as one JSON object"
        ) from None
