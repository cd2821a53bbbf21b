"""Draws figures as small SVG files: no date inside, text as text, so that a new run changes only what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("SVG")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "llama4-dist", "font.size": 9, "axes.grid": True}
mpl.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3, "axes.axisbelow": True}


def bars(path: Path, values: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draw one panel a workload with one bar a contender; each panel has its own scale."""
    workloads = list(next(iter(values.values())))
    figure, axes = plt.subplots(1, len(workloads), figsize=(2.6 * len(workloads), 2.8), layout="constrained")
    for axis, workload in zip(axes, workloads, strict=True):
        names = list(values)
        drawn = axis.bar(
            names, [values[name][workload] for name in names], color=mpl.color_sequences["tab10"][: len(names)]
        )
        axis.bar_label(drawn, fmt="%.0f")
        axis.set_title(workload, fontsize=9)
        axis.tick_params(axis="x", rotation=30)
    axes[0].set_ylabel("tokens per second")
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def lines(
    path: Path,
    sizes: Sequence[int],
    values: Mapping[str, Sequence[float]],
    labels: Mapping[str, str],
    text: tuple[str, str],
) -> None:
    """Draw times in seconds over sizes, both logarithmic, in milliseconds; `text` is the axis' name and a title."""
    figure, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for term, seconds in values.items():
        milliseconds = [1000 * value for value in seconds]
        width = 2.2 if term == "step" else 1.2
        axis.loglog(sizes, milliseconds, marker=".", linewidth=width, label=labels[term])
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    axis.minorticks_off()
    axis.set_xlabel(text[0])
    axis.set_ylabel("milliseconds a step")
    axis.set_title(text[1], fontsize=9)
    axis.legend(title="term (exponent)", fontsize=7, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
