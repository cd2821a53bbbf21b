"""Chooses the node for a worker that is to start: a pure function of what Ray says its nodes offer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A live node: what it offers in all, its labels, and what our own workers hold there already."""

    node: str
    offers: Mapping[str, float]
    labels: Mapping[str, str]
    held: Mapping[str, float]
    num_of_role: int

    def fits(self, bundle: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        """Tell whether a worker may run here, as far as our own workers go."""
        return all(self.labels.get(key) == value for key, value in labels.items()) and all(
            self.offers.get(name, 0.0) - self.held.get(name, 0.0) >= amount for name, amount in bundle.items()
        )


def emptiest(nodes: Sequence[Node], bundle: Mapping[str, float], labels: Mapping[str, str]) -> str | None:
    """Return the node with the fewest workers of the role that has room; None where there is no choice to make."""
    if len(nodes) < 2:
        return None
    fitting = [node for node in nodes if node.fits(bundle, labels)]
    return min(fitting, key=lambda node: (node.num_of_role, node.node)).node if fitting else None
