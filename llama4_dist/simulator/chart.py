"""Draws a simulated run over its time: tokens, queue, busy GPUs and hosts, with what happened; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama4_dist.planner.chart import COLOURS, STYLE
from llama4_dist.simulator.result import SimulationResult


def draw_run(file: Path, result: SimulationResult, title: str) -> None:
    """Write the picture; SVG without a date, so that the same run gives the same file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = result.rows()
    times = [row["at_s"] for row in rows]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        tokens, queue, busy, latency = figure.subplots(4, 1, sharex=True)
        tokens.fill_between(times, [row["tokens_per_s"] for row in rows], step="post", color=COLOURS["shared expert"])
        tokens.set_ylabel("tokens/s")
        _steps(queue, times, rows, {"running": "running", "waiting": "waiting"})
        queue.set_ylabel("sequences")
        _steps(busy, times, rows, {"attention_busy": "attention", "expert_busy": "slowest expert host"})
        busy.set(ylabel="busy", ylim=(0, 1.05))
        hosts = busy.twinx()
        hosts.step(times, [row["hosts"] for row in rows], where="post", color="black", linewidth=1, linestyle=":")
        hosts.set(ylabel="expert hosts (dotted)", ylim=(0, max(row["hosts"] for row in rows) * 1.15))
        _first_tokens(latency, result)
        _marks((tokens, queue, busy, latency), result)
        latency.set_xlabel("seconds of the run")
        figure.suptitle(f"{title}\nsimulated from computed step times, not measured", fontsize=9)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=130)


def _steps(axes: Any, times: Sequence[float], rows: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
    for number, (name, colour) in enumerate(names.items()):
        chosen = COLOURS.get(colour, ("#2a6f97", "#d1495b")[number])
        label = name.replace("_busy", " GPUs")
        axes.step(times, [row[name] for row in rows], where="post", color=chosen, label=label)
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def _first_tokens(axes: Any, result: SimulationResult) -> None:
    done = [record for record in result.records if record.completed]
    axes.scatter(
        [one.scheduled_s for one in done], [one.ttft_s for one in done], s=4, color=COLOURS["attention"], linewidths=0
    )
    axes.set(ylabel="TTFT, s", yscale="log")


def _marks(panels: Sequence[Any], result: SimulationResult) -> None:
    for at_s, text in result.happened:
        for axes in panels:
            axes.axvline(at_s, color="#6c757d", linewidth=0.8, linestyle="--")
        panels[0].annotate(
            text.partition(";")[0], (at_s, 1.02), xycoords=("data", "axes fraction"), fontsize=7, rotation=12
        )
