"""Reads what people type: `96xH200`, `60ms`, `P=1,T=8,groups=8`; every refusal is a ConfigError with the remedy."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from llama4_dist.errors import ConfigError
from llama4_dist.planner.hardware import Hardware, find_hardware
from llama4_dist.planner.layout import Layout

MOST_GPUS = 1 << 16
_NAMES: Mapping[str, str] = {
    "p": "stages",
    "stages": "stages",
    "t": "ranks",
    "ranks": "ranks",
    "groups": "groups",
    "hosts": "hosts",
    "gpus_per_host": "gpus_per_host",
    "s": "slices",
    "slices": "slices",
    "r": "replicas",
    "replicas": "replicas",
    "batch": "sequences",
    "m": "microbatches",
}


def parse_hardware(given: str) -> tuple[int, Hardware]:
    """Read `96xH200`: how many devices of which kind."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*[x×*]\s*([A-Za-z][A-Za-z0-9-]*)\s*", given)
    if found is None:
        raise ConfigError(f"hardware {given!r} is no COUNTxKIND: give e.g. 96xH200")
    count = int(found[1])
    if not 1 <= count <= MOST_GPUS:
        raise ConfigError(f"hardware {given!r}: give from 1 to {MOST_GPUS} devices")
    return count, find_hardware(found[2])


def parse_layout(given: str, base: Layout) -> Layout:
    """Read `P=1,T=8,groups=8,hosts=32,slices=2,batch=512,m=2`; what is not named is as in `base`."""
    changes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        field = _NAMES.get(name.lower())
        if field is None or not equals:
            raise ConfigError(f"layout {part!r}: give NAME=NUMBER, names P, T, {', '.join(list(_NAMES)[4:])}")
        if field in changes:
            raise ConfigError(f"layout names {name} twice: once is enough")
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise ConfigError(f"layout {part!r}: {value!r} is no whole number above 0")
        changes[field] = int(value)
    for needed in ("groups", "hosts"):
        if needed not in changes:
            raise ConfigError(f"layout {given!r} does not say {needed}: add {needed}=NUMBER")
    return replace(base, **changes)  # type: ignore[arg-type]


def positive(name: str, value: float | None) -> float | None:
    """Return `value` if it is left out, or finite and above 0."""
    if value is not None and not (isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} must be a finite number above 0")
    return value
