"""Draws plans: a layer as a time line for each layout, and throughput over time per token; needs matplotlib."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama4_dist.errors import ConfigError
from llama4_dist.planner.document import notes
from llama4_dist.planner.plan import Plan
from llama4_dist.planner.request import PlanRequest

FORMATS = (".svg", ".png")
COLOURS = {
    "attention": "#2a6f97",
    "shared expert": "#61a5c2",
    "dispatch": "#f4a261",
    "slowest expert host": "#d1495b",
    "combine": "#e9c46a",
}
LANES = (("attention", "shared expert"), ("dispatch", "combine"), ("slowest expert host",))
MOST_LINES = 6
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llama4-dist",
    "font.size": 9,
    "axes.spines.top": False,
}
STYLE |= {"axes.spines.right": False}


def check_chart(file: Path | None) -> None:
    """Raise before anything is computed if the picture could not be drawn afterwards."""
    if file is None:
        return
    if file.suffix not in FORMATS:
        raise ConfigError(f"chart {file.name!r} ends in neither of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--chart needs matplotlib, which is not installed: pip install 'llama4-dist[bench]'")


def draw(file: Path, request: PlanRequest, plans: Sequence[Plan], estimates: Sequence[Plan]) -> None:
    """Write the picture; SVG without a date, so that the same plan gives the same file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        lines, cloud = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _time_lines(lines, plans[:MOST_LINES])
        _frontier(cloud, request, plans, estimates)
        title = f"{request.model} on {request.num_gpus} x {request.hardware.name}, context {request.traffic.context:,}"
        figure.suptitle(f"{title}\n{'; '.join(notes(request))}", fontsize=9)
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, metadata=metadata, dpi=130)


def segments(plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """Return when each part of a layer runs, in seconds from its start: (start, duration) per microbatch.

    Attention of the parts is one after the other; a part's rows leave after its attention, and a host computes one
    part after the other. Where that is longer than the formula's layer, parts of neighbouring layers overlap.
    """
    terms = plan.step.terms
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COLOURS}
    own_free = host_free = 0.0
    for _ in range(plan.step.microbatches):
        found["attention"].append((own_free, terms.attention_s))
        leaves = own_free + terms.attention_s
        found["shared expert"].append((leaves, terms.shared_s))
        own_free = leaves + terms.shared_s
        found["dispatch"].append((leaves, terms.dispatch_s))
        starts = max(leaves + terms.dispatch_s, host_free)
        found["slowest expert host"].append((starts, terms.expert_s))
        host_free = starts + terms.expert_s
        found["combine"].append((host_free, terms.combine_s))
    return found


def _time_lines(axes: Any, plans: Sequence[Plan]) -> None:
    for place, plan in enumerate(plans):
        for lane, names in enumerate(LANES):
            for name in names:
                bars = [(1e6 * start, 1e6 * length) for start, length in segments(plan)[name]]
                height = place + 0.12 + 0.22 * lane
                axes.broken_barh(
                    bars, (height, 0.2), color=COLOURS[name], edgecolor="white", linewidth=0.6,
                    label=name if place == 0 else None,
                )  # fmt: skip
        layer_us = 1e6 * plan.step.layer_s
        axes.plot([layer_us, layer_us], [place + 0.08, place + 0.8], color="black", linewidth=1.2)
        axes.text(layer_us, place + 0.07, f"{layer_us:,.0f} us a layer", fontsize=7, ha="center", va="bottom")
    labels = [plan.layout.describe().replace(",hosts", ",\nhosts").replace(",batch", ",\nbatch") for plan in plans]
    axes.set_yticks([place + 0.44 for place in range(len(plans))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds of one MoE layer (lanes: attention GPUs, links, slowest host)")
    axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def frontier(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that no other beats in both time per token and tokens a second, the fastest first."""
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.step.step_s, -plan.tokens_per_s)):
        if not best or plan.tokens_per_s > best[-1].tokens_per_s:
            best.append(plan)
    return best


def _frontier(axes: Any, request: PlanRequest, plans: Sequence[Plan], estimates: Sequence[Plan]) -> None:
    shown = estimates[:: max(1, len(estimates) // 150)]  # a picture of thousands of points is no clearer
    axes.scatter(
        [1e3 * plan.step.step_s for plan in shown], [plan.tokens_per_s for plan in shown],
        s=7, color="#adb5bd", linewidths=0, label="layouts (estimates)",
    )  # fmt: skip
    edge = frontier([*estimates, *plans])
    axes.plot(
        [1e3 * plan.step.step_s for plan in edge], [plan.tokens_per_s for plan in edge],
        color=COLOURS["attention"], linewidth=1.8, label="frontier",
    )  # fmt: skip
    axes.scatter(
        [1e3 * plans[0].step.step_s], [plans[0].tokens_per_s],
        marker="*", s=160, color=COLOURS["slowest expert host"], zorder=3, label="proposed",
    )  # fmt: skip
    if request.slo_tpot_s is not None:
        axes.axvline(1e3 * request.slo_tpot_s, color="black", linestyle=":", linewidth=1, label="time asked for")
    axes.set(xscale="log", yscale="log", xlabel="TPOT, ms", ylabel="tokens/s of the cluster")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
