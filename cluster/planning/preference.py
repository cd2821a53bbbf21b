"""Orders the hosts of a layer's experts: rows go to the first, to the next when that one is lost. It moves nothing."""

from collections import deque
from collections.abc import Collection, Sequence

from cluster.planning.siblings import part

LEAST_GAIN = 1e-3  # of the mean load: what a change of first choices must take off the busiest host


def prefer(
    holders: Sequence[Collection[int]],
    loads: Sequence[float],
    weights: Sequence[float],
    *,
    current: Sequence[Sequence[int]],
    turn: int,
    num_slices: int = 1,
) -> list[tuple[int, ...]]:
    """Return each expert's hosts in order: first choices are even, and so is what others get after any one loss.

    `current` is the order now and breaks ties: a host has in memory the pages of what it computes. `turn` differs
    between layers, so that no host is first everywhere. Slices of one expert prefer different hosts where that makes
    none busier.
    """
    choice = _Choice(holders, loads, weights, num_slices)
    for expert in choice.heaviest_first:
        ranks = {
            host: (
                choice.level(expert, host),
                choice.handed_on(expert, host),
                host not in current[expert][:1],
            )
            for host in sorted(holders[expert], key=lambda host: (host - turn) % len(weights))
        }
        choice.take(expert, min(ranks, key=ranks.__getitem__))
    while any(choice.shift(host) for host in choice.busiest_first()):
        pass
    if num_slices > 1:
        choice.part_slices()
    return choice.in_order(turn)


class _Choice:
    """The first choice of each expert, and how busy these make hosts."""

    def __init__(
        self, holders: Sequence[Collection[int]], loads: Sequence[float], weights: Sequence[float], num_slices: int
    ) -> None:
        self.heaviest_first = sorted(range(len(holders)), key=lambda expert: -loads[expert])
        self.busy = [0.0] * len(weights)
        self._num_slices = num_slices
        self._holders, self._loads, self._weights = holders, loads, weights
        self._first: dict[int, int] = {}
        self._firsts: list[set[int]] = [set() for _ in weights]  # per host the experts that prefer it
        self._least_gain = LEAST_GAIN * sum(loads) / sum(weights)

    def level(self, expert: int, host: int) -> float:
        """Return how busy the host would be with the expert."""
        return round((self.busy[host] + self._loads[expert]) / self._weights[host], 9)

    def handed_on(self, expert: int, host: int) -> float:
        """Return how much of what prefers the host already could fall to the expert's other hosts, were it lost."""
        others = set(self._holders[expert]) - {host}
        return round(sum(self._loads[other] for other in self._firsts[host] if others & set(self._holders[other])), 9)

    def take(self, expert: int, host: int) -> None:
        """Let the expert prefer that host."""
        if expert in self._first:
            before = self._first[expert]
            self.busy[before] -= self._loads[expert]
            self._firsts[before].remove(expert)
        self._first[expert] = host
        self.busy[host] += self._loads[expert]
        self._firsts[host].add(expert)

    def busiest_first(self) -> list[int]:
        return sorted(range(len(self.busy)), key=lambda host: (-self.busy[host] / self._weights[host], host))

    def shift(self, worst: int) -> bool:
        """Relieve a host along a chain: it hands an expert to a host, which hands one on; False if it cannot.

        Every host on the way ends less busy than the relieved one was, so this comes to an end.
        """
        bound = self.busy[worst] / self._weights[worst] - self._least_gain
        came: dict[int, tuple[int, int]] = {worst: (worst, -1)}  # host: (the one before it, the expert it gets)
        queue = deque([worst])
        while queue:
            host = queue.popleft()
            received = self._loads[came[host][1]] if host != worst else 0.0
            for expert in sorted(self._firsts[host], key=lambda expert: (-self._loads[expert], expert)):
                if (self.busy[host] + received - self._loads[expert]) / self._weights[host] > bound:
                    continue
                for target in sorted(self._holders[expert]):
                    if target in came:
                        continue
                    came[target] = (host, expert)
                    if (self.busy[target] + self._loads[expert]) / self._weights[target] <= bound:
                        self._carry(target, came)
                        return True
                    queue.append(target)
        return False

    def part_slices(self) -> None:
        """Exchange first choices so that slices of one expert have different ones."""
        firsts = [{self._first[expert]} for expert in range(len(self._holders))]
        part(
            firsts, self._num_slices, self._loads, self._weights, lambda unit, _, target: target in self._holders[unit]
        )
        for expert, (host,) in enumerate(firsts):
            if host != self._first[expert]:
                self.take(expert, host)

    def _carry(self, host: int, came: dict[int, tuple[int, int]]) -> None:
        while came[host][1] >= 0:
            before, expert = came[host]
            self.take(expert, host)
            host = before

    def in_order(self, turn: int) -> list[tuple[int, ...]]:
        """Return all hosts of each expert, the further ones so that the load of a lost host is spread."""
        extra = [[0.0] * len(self._weights) for _ in self._weights]  # per lost host what the others get
        order: list[tuple[int, ...]] = [()] * len(self._holders)
        for expert in self.heaviest_first:
            first = self._first[expert]

            def level(host: int, first: int = first) -> tuple[float, int]:
                busy = (self.busy[host] + extra[first][host]) / self._weights[host]
                return round(busy, 9), (host - turn) % len(self._weights)

            others = sorted((host for host in self._holders[expert] if host != first), key=level)
            order[expert] = (first, *others)
            if others:
                extra[first][others[0]] += self._loads[expert]
        return order
