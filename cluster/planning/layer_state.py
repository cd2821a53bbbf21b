"""One layer while its experts are placed: the task in numbers, and what each host has so far; it decides nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTask:
    """Per expert its load, copies, most copies on one node and hosts now; per host its quota, node and weight.

    Where experts are cut, each of their `num_slices` is an expert here, those of one side by side.
    """

    loads: Sequence[float]
    copies: Sequence[int]
    node_limits: Sequence[int]
    held: Sequence[Sequence[int]]
    quotas: Sequence[int]
    nodes: Sequence[int]
    weights: Sequence[float]
    num_slices: int = 1

    def copy_load(self, expert: int) -> float:
        """Return the load of one copy, as if the expert's rows were spread over all of them."""
        return self.loads[expert] / self.copies[expert]

    @property
    def num_nodes(self) -> int:
        return max(self.nodes) + 1


class LayerState:
    """Who holds what, how busy hosts are, and how many experts each two share: who takes over when one is lost."""

    def __init__(self, task: LayerTask, holders: Iterable[Iterable[int]]) -> None:
        self.task = task
        self.holders: list[set[int]] = [set() for _ in task.loads]
        self.held: list[set[int]] = [set() for _ in task.weights]
        self.busy = [0.0] * len(task.weights)
        self._shared = [[0] * len(task.weights) for _ in task.weights]
        for expert, hosts in enumerate(holders):
            for host in hosts:
                self.put(expert, host)

    def put(self, expert: int, host: int) -> None:
        self._count_shared(expert, host, 1)
        self.holders[expert].add(host)
        self.held[host].add(expert)
        self.busy[host] += self.task.copy_load(expert)

    def drop(self, expert: int, host: int) -> None:
        self.holders[expert].remove(host)
        self.held[host].remove(expert)
        self.busy[host] -= self.task.copy_load(expert)
        self._count_shared(expert, host, -1)

    def shared(self, expert: int, host: int) -> int:
        """Return the most experts that the host shares with one of the expert's other hosts."""
        return max((self._shared[host][other] for other in self.holders[expert] if other != host), default=0)

    def on_node(self, expert: int, node: int) -> list[int]:
        return [host for host in self.holders[expert] if self.task.nodes[host] == node]

    def _count_shared(self, expert: int, host: int, change: int) -> None:
        for other in self.holders[expert]:
            self._shared[host][other] += change
            self._shared[other][host] += change
