"""Draws loads of experts and hosts as text: pure, and readable without colour."""

import math
from collections.abc import Mapping, Sequence

from rich.text import Text

from llama4_dist.cli.output import human_bytes
from llama4_dist.client.admin_experts import ExpertLoad, HostLoad

IDLE = "·"
# From cold to hot, one for each digit 1 to 9; dark enough for white digits, then light enough for black ones.
COLOURS = ("#1f3b73", "#25608f", "#2b86a0", "#33a08c", "#5cb85c", "#b5c334", "#f0b429", "#ef7d22", "#d7301f")
FIRST_LIGHT = 4
LABEL_WIDTH = 6
BALANCE_WIDTH = 9
MAX_CELL = 3
RULER_STEP = 8
BAR_WIDTH = 30


def heatmap(experts: Sequence[ExpertLoad], *, width: int, height: int | None) -> Text:
    """Draw one row per layer and one cell per expert, over all copies; the digit is the share of the busiest in ninths.

    An expert that is cut has a cell per slice, and is numbered as 3.1.

    Where experts do not fit side by side they go on in a second band of rows; where those would not fit the height,
    neighbours share a cell, which shows the busiest of them.
    """
    num_slices = 1 + max(one.slice for one in experts)
    rates = rates_of(experts, num_slices)
    layers = sorted({layer for layer, _ in rates})
    num_experts = 1 + max(expert for _, expert in rates)
    columns = max(1, width - LABEL_WIDTH - BALANCE_WIDTH)
    group = 1
    if height is not None and math.ceil(num_experts / columns) * (len(layers) + 1) + 2 > height:
        group = math.ceil(num_experts / columns)
    num_cells = math.ceil(num_experts / group)
    cell = max(1, min(MAX_CELL, columns // num_cells))
    per_band = even_share(num_cells, columns // cell)
    top = max(rates.values())
    drawn = Text(no_wrap=True)
    for begin in range(0, num_cells, per_band):
        cells = range(begin, min(begin + per_band, num_cells))
        drawn.append(ruler(cells, group=group, cell=cell, num_slices=num_slices) + "\n", style="dim")
        for layer in layers:
            drawn.append(f"{layer:>{LABEL_WIDTH - 1}} ")
            for index in cells:
                members = range(index * group, min((index + 1) * group, num_experts))
                rate = max(rates.get((layer, expert), 0.0) for expert in members)
                draw_cell(drawn, rate, top, cell)
            drawn.append(f"{balance(rates, layer, num_experts):>{BALANCE_WIDTH}.2f}\n", style="dim")
    draw_legend(drawn, top, group, "slices" if num_slices > 1 else "experts")
    return drawn


def rates_of(experts: Sequence[ExpertLoad], num_slices: int) -> dict[tuple[int, int], float]:
    """Add the copies of each expert; of each slice, numbered on, where experts are cut."""
    rates: dict[tuple[int, int], float] = {}
    for one in experts:
        place = one.layer, one.expert * num_slices + one.slice
        rates[place] = rates.get(place, 0.0) + one.rows_per_s
    return rates


def level(rate: float, top: float) -> int:
    """Return 0 for nothing, else 1 to 9 by the share of the busiest, so that little is still seen."""
    return 0 if rate <= 0 or top <= 0 else min(9, max(1, math.ceil(9 * rate / top)))


def balance(rates: Mapping[tuple[int, int], float], layer: int, num_experts: int) -> float:
    """Busiest expert of a layer / mean of the layer; 0 where it is idle."""
    values = [rates.get((layer, expert), 0.0) for expert in range(num_experts)]
    return max(values) * num_experts / sum(values) if sum(values) else 0.0


def draw_cell(drawn: Text, rate: float, top: float, cell: int) -> None:
    """Append one expert."""
    heat = level(rate, top)
    if heat == 0:
        drawn.append(IDLE.center(cell), style="dim")
        return
    ink = "black" if heat > FIRST_LIGHT else "white"
    drawn.append(str(heat).center(cell), style=f"{ink} on {COLOURS[heat - 1]}")


def ruler(cells: range, *, group: int, cell: int, num_slices: int) -> str:
    """Number every eighth cell by its first expert, or slice."""

    def name(number: int) -> str:
        return str(number) if num_slices == 1 else "{}.{}".format(*divmod(number, num_slices))

    marks = "".join(
        f"{name(index * group):<{min(RULER_STEP, len(cells) - place) * cell}}"
        for place, index in enumerate(cells)
        if place % RULER_STEP == 0
    )
    return f"{'layer':<{LABEL_WIDTH}}{marks:<{len(cells) * cell}}{'max/mean':>{BALANCE_WIDTH}}"


def even_share(num_cells: int, most: int) -> int:
    """Cells of one band, at most `most`: bands as alike as the ruler's step allows."""
    num_bands = math.ceil(num_cells / most)
    share = math.ceil(num_cells / num_bands)
    return min(most, math.ceil(share / RULER_STEP) * RULER_STEP)


def draw_legend(drawn: Text, top: float, group: int, noun: str) -> None:
    """Append what the cells mean."""
    drawn.append(f"{IDLE} idle ")
    for heat in range(1, 10):
        draw_cell(drawn, heat, 9, 1)
    shared = f", a cell is the busiest of {group} {noun}" if group > 1 else ""
    drawn.append(f" up to {top:,.0f} rows/s{shared}")


def host_bars(hosts: Sequence[HostLoad], *, width: int) -> Text:
    """Draw one bar per host."""
    drawn = Text(no_wrap=True)
    top = max((host.rows_per_s for host in hosts), default=0.0)
    names = max((len(host.host) for host in hosts), default=0)
    bar_width = max(5, min(BAR_WIDTH, width - names - 60))
    for host in hosts:
        filled = round(bar_width * host.rows_per_s / top) if top > 0 else 0
        drawn.append(f"{host.host:<{names}} ")
        drawn.append("█" * filled, style=COLOURS[max(0, level(host.rows_per_s, top) - 1)])
        drawn.append("░" * (bar_width - filled), style="dim")
        drawn.append(
            f" {host.rows_per_s:>10,.0f} rows/s  busy {host.busy:>4.0%}  queue {host.queue_depth:>4}  "
            f"{human_bytes(host.bytes_held):>9}{in_memory(host)}\n"
        )
    return drawn


def in_memory(host: HostLoad) -> str:
    """Say how much of what the host holds is in memory, where that is bounded."""
    held = host.num_resident + host.num_mapped
    if not held:
        return ""
    asked = host.residency_hits + host.residency_misses
    hits = f"  hits {host.residency_hits / asked:.0%}" if asked else ""
    return f"  {host.num_resident:,} of {held:,} in memory{hits}"
