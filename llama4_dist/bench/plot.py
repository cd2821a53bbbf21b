"""Draws a rate sweep as a picture; needs matplotlib, which comes with the extra `bench`."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama4_dist.bench.records import wrong
from llama4_dist.errors import ConfigError

FORMATS = (".svg", ".png")


def check_plot(file: Path | None) -> None:
    """Raise before anything is measured if the picture could not be drawn afterwards."""
    if file is None:
        return
    if file.suffix not in FORMATS:
        raise wrong("plot", f"{file.name!r} ends in neither of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'llama4-dist[bench]'")


def plot_sweep(file: Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Write throughput and goodput, and latencies, over the request rate."""
    from matplotlib.figure import Figure

    rates = [result["request_rate"] for result in results]
    figure = Figure(figsize=(9, 4), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    throughput.plot(rates, [result["request_throughput"] for result in results], "o-", label="completed")
    throughput.plot(rates, [result["goodput"] for result in results], "s--", label="goodput")
    throughput.set(xlabel="requests/s sent", ylabel="requests/s", title="throughput")
    for name in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"):
        latency.plot(rates, [result[name] for result in results], "o-", label=name)
    latency.set(xlabel="requests/s sent", ylabel="ms", title="latency", yscale="log")
    for axes in (throughput, latency):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(file)
