"""What each (layer, expert) has to compute, and how evenly a placement spreads it; who measured it is not known."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from cluster.planning.placement import ExpertGeometry, Pair, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoads:
    """Rows a second of each (layer, expert), or any unit; a pair that is missing has none."""

    rows: Mapping[Pair, float]

    def __post_init__(self) -> None:
        for pair, rows in self.rows.items():
            if not isfinite(rows) or rows < 0:
                raise ValueError(f"the load of (layer, expert) {pair} is {rows}: it must be finite and at least 0")

    @classmethod
    def uniform(cls, geometry: ExpertGeometry) -> "ExpertLoads":
        """Every expert alike: what is assumed before anything is measured."""
        return cls(rows=dict.fromkeys(geometry.pairs, 1.0))

    def check(self, geometry: ExpertGeometry) -> None:
        """Refuse loads of experts the model does not have."""
        if unknown := self.rows.keys() - set(geometry.pairs):
            raise ValueError(f"loads name (layer, expert) {min(unknown)}, which the model does not have")

    def of_layer(self, geometry: ExpertGeometry, layer: int) -> list[float]:
        """Return each expert's load as a multiple of the layer's mean; a layer that saw nothing counts as even."""
        rows = [self.rows.get((layer, expert), 0.0) for expert in range(geometry.num_units)]
        mean = sum(rows) / len(rows)
        if mean == 0:
            return [1.0] * len(rows)
        # A sliver each: experts without rows are spread by number.
        return [(one / mean + 1e-6) / (1 + 1e-6) for one in rows]


def balancedness(
    geometry: ExpertGeometry,
    placement: Placement,
    loads: ExpertLoads,
    *,
    split: bool = False,
    weights: Mapping[str, float] | None = None,
) -> float:
    """Return the mean over layers of the busiest host's load over the mean load; 1.0 is even.

    A pair's rows go to its preferred host, or evenly to all of its hosts with `split`. `weights` names all hosts and
    their speeds, so that idle ones count; without it they are the hosts of the placement, equally fast.
    """
    speeds = weights or {host: 1.0 for hosts in placement.hosts_of.values() for host in hosts}
    ratios = [_layer_ratio(geometry, placement, loads, layer, split, speeds) for layer in geometry.moe_layers]
    return sum(ratios) / len(ratios)


def _layer_ratio(
    geometry: ExpertGeometry,
    placement: Placement,
    loads: ExpertLoads,
    layer: int,
    split: bool,
    speeds: Mapping[str, float],
) -> float:
    busy = dict.fromkeys(speeds, 0.0)
    for expert in range(geometry.num_units):
        hosts = placement.hosts_of.get((layer, expert), ())
        takers = hosts if split else hosts[:1]
        for host in takers:
            busy[host] += loads.rows.get((layer, expert), 0.0) / len(takers)
    total = sum(busy.values())
    if total == 0:
        return 1.0
    return max(rows / speeds[host] for host, rows in busy.items()) * sum(speeds.values()) / total
