"""How unevenly a step's rows fall on experts and hosts: expectations over draws from a fixed seed; no clock, no state.

Top-1 routing of B rows is Multinomial(B, p). A layer waits for its slowest host, so what counts is the expectation of
the maximum, which has no closed form for sums over experts; 2,000 draws give it to about 0.3 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

SEED = 20_240
SAMPLES = 2_000


def zipf(num_experts: int, exponent: float) -> tuple[float, ...]:
    """Return popularities p_e in proportion to 1/(e+1)^exponent; 0 is uniform."""
    weights = [(expert + 1.0) ** -exponent for expert in range(num_experts)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def expected_distinct(num_rows: int, popularity: Sequence[float]) -> float:
    """Return E[experts with at least one of `num_rows` rows], exactly: the sum of 1 - (1 - p)^rows."""
    return sum(1.0 - (1.0 - share) ** num_rows for share in popularity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Which host serves what: `units` are (expert, slice) in order, `hosts_of` the serving host of each."""

    num_hosts: int
    num_slices: int
    hosts_of: tuple[int, ...]


@lru_cache(maxsize=512)
def spread(popularity: tuple[float, ...], num_slices: int, num_hosts: int) -> Spread:
    """Place the slices of all experts: the most popular first, each on the host with the least load so far.

    Ties go to the host with the fewest slices, then to the lowest number; slices of one expert lie on distinct hosts
    where there are enough. So the cluster's own planner evens loads out, but for its memory of what was before.
    """
    queue = [(0.0, 0, host) for host in range(num_hosts)]
    hosts_of = [0] * (len(popularity) * num_slices)
    for expert in sorted(range(len(popularity)), key=lambda expert: (-popularity[expert], expert)):
        share = popularity[expert] / num_slices
        for first in range(0, num_slices, num_hosts):  # a second time round only where hosts are fewer than slices
            taken = [heappop(queue) for _ in range(min(num_hosts, num_slices - first))]
            for piece, (load, held, host) in enumerate(taken, start=first):
                hosts_of[expert * num_slices + piece] = host
                heappush(queue, (round(load + share, 12), held + 1, host))
    return Spread(num_hosts=num_hosts, num_slices=num_slices, hosts_of=tuple(hosts_of))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowest:
    """Expectations over the draws: seconds of the slowest host, and rows on the host that has most."""

    seconds: float  # T_E
    rows: float  # B_e
    mean_seconds: float  # of all hosts: what they are busy


@lru_cache(maxsize=4096)
def slowest_host(
    num_rows: int,
    popularity: tuple[float, ...],
    placed: Spread,
    *,
    read_s: float,
    row_s: float,
    extra_s: float = 0.0,
    samples: int = SAMPLES,
) -> Slowest:
    """Return T_E and B_e: a slice that has rows takes max(read_s, rows x row_s) + extra_s, and a host's add up."""
    import numpy as np

    counts = _draws(num_rows, popularity, samples)
    hosts = np.zeros((len(popularity), placed.num_hosts))
    for unit, host in enumerate(placed.hosts_of):
        hosts[unit // placed.num_slices, host] += 1.0
    seconds = np.where(counts > 0, np.maximum(read_s, counts * row_s) + extra_s, 0.0) @ hosts
    # Of an expert with several slices on one host the rows come once.
    rows = counts @ np.minimum(hosts, 1.0)
    return Slowest(
        seconds=float(seconds.max(axis=1).mean()),
        rows=float(rows.max(axis=1).mean()),
        mean_seconds=float(seconds.mean()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fullest:
    """The host with most, estimated without draws: how many of its slices have rows, and its rows."""

    distinct: float
    mean_distinct: float
    rows: float


@lru_cache(maxsize=65536)
def estimate_fullest(num_rows: int, popularity: tuple[float, ...], num_slices: int, num_hosts: int) -> Fullest:
    """Estimate by means and deviations, as if hosts were independent normals: to rank many layouts, not to report.

    The expected maximum of n of them is their mean and z(n) deviations, z by Blom's approximation.
    """
    z = NormalDist().inv_cdf((num_hosts - 0.375) / (num_hosts + 0.25)) if num_hosts > 1 else 0.0
    hit = [1.0 - (1.0 - share) ** num_rows for share in popularity]
    total_hit, most_distinct, most_rows = sum(hit) * num_slices, 0.0, 0.0
    for experts, held in _kinds_of_hosts(popularity, num_slices, num_hosts):
        mean = sum(hit[e] for e in experts)
        deviation = sqrt(sum(hit[e] * (1.0 - hit[e]) for e in experts))
        distinct = min(float(len(experts)), mean + z * deviation)
        most_distinct = max(most_distinct, held / max(1, len(experts)) * distinct)
        share = min(1.0, sum(popularity[e] for e in experts))
        most_rows = max(most_rows, min(num_rows, num_rows * share + z * sqrt(num_rows * share * (1.0 - share))))
    # A few rows can be no less than one on some host.
    return Fullest(
        distinct=max(1.0, most_distinct),
        mean_distinct=total_hit / num_hosts,
        rows=max(1.0, most_rows),
    )


@lru_cache(maxsize=512)
def _kinds_of_hosts(
    popularity: tuple[float, ...], num_slices: int, num_hosts: int
) -> tuple[tuple[frozenset[int], int], ...]:
    """Return experts and number of slices of one host of each kind: those with as many of both, and of rows."""
    experts: list[set[int]] = [set() for _ in range(num_hosts)]
    held = [0] * num_hosts
    for unit, host in enumerate(spread(popularity, num_slices, num_hosts).hosts_of):
        experts[host].add(unit // num_slices)
        held[host] += 1
    kinds = {
        (len(of_host), count, round(sum(popularity[e] for e in of_host), 9)): (frozenset(of_host), count)
        for of_host, count in zip(experts, held, strict=True)
    }
    return tuple(kinds.values())


def estimated_slowest(fullest: Fullest, *, read_s: float, row_s: float) -> Slowest:
    """Return T_E and B_e of an estimate: the fullest host reads what has rows, or computes its rows."""
    seconds = max(fullest.distinct * read_s, fullest.rows * row_s)
    return Slowest(seconds=seconds, rows=fullest.rows, mean_seconds=min(seconds, fullest.mean_distinct * read_s))


@lru_cache(maxsize=64)
def _draws(num_rows: int, popularity: tuple[float, ...], samples: int) -> "Matrix":
    import numpy as np

    shares = np.asarray(popularity) / sum(popularity)
    return np.random.default_rng(SEED).multinomial(num_rows, shares, size=samples).astype(np.float64)
