"""Exchanges experts between the busiest host of a layer and others while that evens it out; quotas stay as they are."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

May = Callable[[int, int, int], bool]  # (expert, host it leaves, host it goes to)


class _Exchange(NamedTuple):
    top: float  # the busier of the two hosts afterwards
    given: int
    taken: int
    host: int


def exchange(
    holders: Sequence[set[int]], copy_loads: Sequence[float], weights: Sequence[float], may: May, min_gain: float
) -> None:
    """Change `holders`, the hosts of each expert, until no exchange takes `min_gain` of the mean off the busiest."""
    held: list[list[tuple[float, int]]] = [[] for _ in weights]  # per host its experts, lightest first
    for expert, hosts in enumerate(holders):
        for host in hosts:
            insort(held[host], (copy_loads[expert], expert))
    busy = [sum(load for load, _ in experts) for experts in held]
    least_gain = min_gain * sum(busy) / sum(weights)
    while True:
        worst = max(range(len(weights)), key=lambda host: (busy[host] / weights[host], -host))
        best = _best(held, busy, weights, worst, may)
        if best is None or busy[worst] / weights[worst] - best.top < least_gain:
            return
        for expert, source, target in ((best.given, worst, best.host), (best.taken, best.host, worst)):
            entry = (copy_loads[expert], expert)
            held[source].remove(entry)
            insort(held[target], entry)
            busy[source] -= entry[0]
            busy[target] += entry[0]
            holders[expert].remove(source)
            holders[expert].add(target)


def _best(
    held: Sequence[Sequence[tuple[float, int]]], busy: Sequence[float], weights: Sequence[float], worst: int, may: May
) -> _Exchange | None:
    """Find the exchange with the busiest host that leaves the busier of the two least busy."""
    best: _Exchange | None = None
    for host, experts in enumerate(held):
        if host == worst:
            continue
        # The difference of loads that would make both equally busy.
        wanted = (busy[worst] * weights[host] - busy[host] * weights[worst]) / (weights[worst] + weights[host])
        for load, given in held[worst]:
            if load <= 0 or not may(given, worst, host):
                continue
            at = bisect_left(experts, (load - wanted, -1))
            for other, taken in experts[max(0, at - 1) : at + 2]:
                if other >= load or not may(taken, host, worst):
                    continue
                top = max((busy[worst] - load + other) / weights[worst], (busy[host] + load - other) / weights[host])
                if best is None or top < best.top - 1e-12:
                    best = _Exchange(top, given, taken, host)
    return best
