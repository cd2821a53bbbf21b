"""Reads how often each expert was asked for, measured by a cluster, as the popularity p_e of the formulae."""

import json
from math import isfinite
from pathlib import Path

from llama4_dist.errors import ConfigError

MOST_BYTES = 4 << 20


def read_popularity(file: Path, num_experts: int) -> tuple[float, ...]:
    """Return shares that add up to 1 from a JSON array of one load (rows, tokens, any unit) for each expert."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"loads {file} are larger than {MOST_BYTES >> 20} MiB: give one number for each expert")
        loads = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read loads {file}: {error}") from None
    if not isinstance(loads, list) or len(loads) != num_experts:
        raise ConfigError(f"loads {file} must be a JSON array of {num_experts} numbers, one for each expert")
    if not all(type(load) in (int, float) and isfinite(load) and load >= 0 for load in loads) or not sum(loads) > 0:
        raise ConfigError(f"loads {file} must be finite, 0 or more, and not all 0")
    total = float(sum(loads))
    return tuple(load / total for load in loads)
