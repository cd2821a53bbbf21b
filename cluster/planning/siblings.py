"""Keeps the slices of an expert on different hosts: a token needs all of them at once, so that hosts share its work.

Knows one layer in numbers. It exchanges units that weigh about the same, so that it neither makes a host busier than
the busiest nor changes how many units one has.
"""

from collections.abc import Callable, Iterator, Sequence

May = Callable[[int, int, int], bool]  # (unit, host it leaves, host it goes to)


class Siblings:
    """Slices of experts of one layer: units number · num_slices to (number + 1) · num_slices - 1 are one expert's."""

    def __init__(self, where: Sequence[set[int]], num_slices: int) -> None:
        self._where = where  # per unit its hosts
        self._num_slices = num_slices

    def on(self, unit: int, host: int) -> int:
        """Return how many other slices of the unit's expert the host has."""
        first = unit // self._num_slices * self._num_slices
        others = range(first, first + self._num_slices)
        return sum(host in self._where[other] for other in others if other != unit)


def part(
    where: Sequence[set[int]], num_slices: int, loads: Sequence[float], weights: Sequence[float], may: May
) -> None:
    """Change `where` until no allowed exchange parts two slices of one expert; each exchange parts at least one."""
    siblings = Siblings(where, num_slices)
    units_of = [{unit for unit, hosts in enumerate(where) if host in hosts} for host in range(len(weights))]
    busy = [sum(loads[unit] for unit in units) for units in units_of]
    top = max(load / weight for load, weight in zip(busy, weights, strict=True)) + 1e-9

    def partners(unit: int, source: int, target: int) -> Iterator[int]:
        for other in sorted(units_of[target], key=lambda one: (abs(loads[one] - loads[unit]), one)):
            grown = loads[unit] - loads[other]
            fits = (busy[target] + grown) / weights[target] <= top and (busy[source] - grown) / weights[source] <= top
            is_new = unit not in units_of[target] and other not in units_of[source]
            if fits and is_new and not siblings.on(other, source) and may(other, target, source):
                yield other

    for unit, hosts in enumerate(where):
        for source in sorted(hosts):
            if not siblings.on(unit, source):
                continue
            targets = [host for host in range(len(weights)) if not siblings.on(unit, host)]
            found = (
                (target, other)
                for target in targets
                if may(unit, source, target)
                for other in partners(unit, source, target)
            )
            target, other = next(found, (-1, -1))
            if target < 0:
                continue
            for one, leaves, goes_to in ((unit, source, target), (other, target, source)):
                where[one].remove(leaves)
                where[one].add(goes_to)
                units_of[leaves].remove(one)
                units_of[goes_to].add(one)
                busy[leaves] -= loads[one]
                busy[goes_to] += loads[one]
