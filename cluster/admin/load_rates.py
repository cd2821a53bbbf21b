"""Rates of experts and hosts from two readings of their counters: pure arithmetic, no control plane."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.operation import HostLoad
from cluster.planning.placement import Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReading:
    """All hosts' counters, read at `taken_s` of this process's monotonic clock; hosts may have clocks of their own."""

    taken_s: float
    loads: Mapping[str, HostLoad]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRate:
    """The load of one copy of an expert; `rows` since its host began."""

    host: str
    pair: Pair
    rows_per_s: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRate:
    """The load of one host; `busy` is the share of the window it computed."""

    load: HostLoad
    rows_per_s: float
    busy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRates:
    """What happened within a window; experts by host, layer and expert."""

    window_s: float
    hosts: tuple[HostRate, ...]
    experts: tuple[ExpertRate, ...]


def rates(before: LoadReading, now: LoadReading, held_by: Mapping[str, Sequence[Pair]]) -> LoadRates:
    """Divide differences by time; `held_by` adds the copies that had no row yet."""
    window_s = now.taken_s - before.taken_s
    hosts: list[HostRate] = []
    experts: list[ExpertRate] = []
    for host, load in sorted(now.loads.items()):
        base = base_of(before.loads.get(host), load)
        elapsed_s = load.at_s - base.at_s if base.incarnation == load.incarnation else window_s
        per_s = 1 / elapsed_s if elapsed_s > 0 else 0.0
        for pair in sorted({*load.rows, *held_by.get(host, ())}):
            rows = load.rows.get(pair, 0)
            grown = max(0, rows - base.rows.get(pair, 0))
            experts.append(ExpertRate(host=host, pair=pair, rows_per_s=grown * per_s, rows=rows))
        grown = sum(max(0, rows - base.rows.get(pair, 0)) for pair, rows in load.rows.items())
        busy = min(1.0, max(0.0, (load.compute_s - base.compute_s) * per_s))
        hosts.append(HostRate(load=load, rows_per_s=grown * per_s, busy=busy))
    return LoadRates(window_s=window_s, hosts=tuple(hosts), experts=tuple(experts))


def base_of(before: HostLoad | None, now: HostLoad) -> HostLoad:
    """Return what the host's counters are compared with.

    A host never seen before is its own base: how long it took to count is unknown. One that started anew counts from 0.
    """
    if before is None or before.incarnation == now.incarnation:
        return before or now
    return HostLoad(host=now.host, incarnation=before.incarnation, at_s=before.at_s)
