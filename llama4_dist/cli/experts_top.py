"""`llama4-dist experts top`: the heatmap once, live, or as one JSON document."""

from dataclasses import asdict, replace

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from llama4_dist.cli.admin import Admin
from llama4_dist.cli.heatmap import heatmap, host_bars
from llama4_dist.cli.output import console, print_json, reporting, until_ctrl_c
from llama4_dist.client.admin import AdminClient
from llama4_dist.client.admin_experts import Loads

SPARE_LINES = 3  # title, a blank line, and the line of the cursor


def run_top(admin: Admin, *, once: bool, interval_s: float, layer: int | None) -> None:
    """Show loads until Ctrl-C, which is the ordinary end; once for scripts."""
    with reporting(admin.as_json), admin.open() as client:
        if not admin.as_json and not once:
            with until_ctrl_c():
                show_live(client, interval_s, layer)
            return
        loads = client.loads(window_s=interval_s, layer=layer)
    if admin.as_json:
        print_json(asdict(loads))
    else:
        console.print(picture(loads, height=None))


def show_live(client: AdminClient, interval_s: float, layer: int | None) -> None:
    """Draw every interval over the last one; where the output is no terminal, one below the other."""
    pictures = (only(loads, layer) for loads in client.watch_loads(interval_s=interval_s))
    if not console.is_terminal:
        for loads in pictures:
            console.print(picture(loads, height=None))
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        for loads in pictures:
            live.update(picture(loads, height=console.height), refresh=True)


def only(loads: Loads, layer: int | None) -> Loads:
    """Leave out other layers."""
    if layer is None:
        return loads
    return replace(loads, experts=tuple(one for one in loads.experts if one.layer == layer))


def picture(loads: Loads, *, height: int | None) -> RenderableType:
    """Lay out one interval; with a height experts share cells where rows would not fit."""
    if not loads.experts:
        return Text("no expert is placed here: is the layer one with experts?")
    title = Text(f"rows per second over {loads.window_s:.2f} s", style="bold")
    left = height - SPARE_LINES - len(loads.hosts) if height is not None else None
    return Group(
        title,
        heatmap(loads.experts, width=console.width, height=left),
        Text(),
        host_bars(loads.hosts, width=console.width),
    )
