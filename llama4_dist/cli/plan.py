"""`llama4-dist plan`: which layout of so many devices serves a model best, and why; computed, nothing is started."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llama4_dist.cli.output import console, print_json, reporting
from llama4_dist.cli.plan_flags import PlanFlags, PlanOutput
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError
from llama4_dist.planner import formats
from llama4_dist.planner.chart import check_chart, draw
from llama4_dist.planner.document import notes, plan_document
from llama4_dist.planner.explain import explain
from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.hardware import PRICE_SOURCE, Efficiency
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.model_source import find_model
from llama4_dist.planner.multinomial import zipf
from llama4_dist.planner.parse import parse_hardware, parse_layout
from llama4_dist.planner.plan import Plan, evaluate, refusals
from llama4_dist.planner.popularity import read_popularity
from llama4_dist.planner.request import Objective, PlanRequest
from llama4_dist.planner.roofline import Traffic
from llama4_dist.planner.search import Found, search

MOST_TOP = 100
LAYOUT_COLUMNS = ("", "groups", "P", "T", "hosts", "S", "R", "batch", "m", "GPUs", "TPOT ms", "tok/s", "/GPU", "per M")
TERM_COLUMNS = ("", "attn", "shared", "out", "expert", "back", "layer", "exposed", "GB A", "GB E", "busy A", "busy E")


def run_plan(flags: PlanFlags, price: float | None, output: PlanOutput) -> None:
    """Search, or judge the one layout given; write the picture and the document; show the table."""
    with reporting(output.as_json):
        if not 1 <= output.top <= MOST_TOP:
            raise ConfigError(f"top={output.top} must be from 1 to {MOST_TOP}")
        check_chart(output.chart)
        request = request_of(flags, price)
        found = find_plans(request, flags.layout, output.top)
        document = plan_document(request, found.plans[0], found.plans[1:])
        if output.file is not None:
            write_document(output.file, document)
        if output.chart is not None:
            draw(output.chart, request, found.plans, found.estimates)
    if output.as_json:
        print_json(document)
        return
    _show(request, found, explained=output.explain)


def request_of(flags: PlanFlags, price_per_hour: float | None = None) -> PlanRequest:
    """Turn flags into a request, or say which flag is wrong; without a price the planner takes its example."""
    source = find_model(flags.model)
    count, hardware = parse_hardware(flags.hardware)
    if flags.objective not in list(Objective):
        raise ConfigError(f"objective={flags.objective!r} is none of {', '.join(Objective)}")
    if not 0 <= flags.skew <= 10:
        raise ConfigError(f"skew={flags.skew} must lie from 0 (uniform) to 10")
    dtype = flags.dtype if flags.dtype != "auto" else source.dtype
    defaults = Layout(
        dtype=dtype,
        wire=flags.wire if flags.wire != "auto" else _wire_for(dtype),
        kv_dtype=flags.kv_dtype if flags.kv_dtype != "auto" else _wire_for(dtype),
        link=flags.link,
        replicas=flags.replicas,
    )
    return PlanRequest(
        model=source.name,
        synthetic=source.synthetic,
        geometry=Geometry(config=source.config),
        hardware=hardware,
        num_gpus=count,
        traffic=Traffic(context=flags.context, popularity=_popularity(flags, source.config), pooled=flags.pooled),
        defaults=defaults,
        efficiency=Efficiency(alpha_s=flags.alpha_us * 1e-6),
        measured_rates=flags.measured_rates,
        objective=Objective(flags.objective),
        slo_tpot_s=flags.slo_tpot_s,
        batch=flags.batch,
        price_per_hour=price_per_hour,
        memory_share=flags.memory_share,
    )


def _popularity(flags: PlanFlags, config: ModelConfig) -> tuple[float, ...]:
    if flags.loads is None:
        return zipf(max(1, config.num_experts), flags.skew)
    if flags.skew:
        raise ConfigError(f"skew={flags.skew} and measured loads exclude each other: leave one out")
    return read_popularity(flags.loads, config.num_experts)


def find_plans(request: PlanRequest, layout: str | None, top: int) -> Found:
    """Search, or judge one layout; ConfigError with every reason where it is impossible."""
    if layout is None:
        return search(request, top=top)
    wanted = parse_layout(layout, request.defaults)
    if "batch" not in layout and request.batch is not None:
        wanted = replace(wanted, sequences=-(-request.batch // wanted.groups))
    reasons = refusals(request, wanted)
    if reasons:
        raise ConfigError(f"layout {wanted.describe()} is impossible: {'; '.join(reasons)}")
    plan = evaluate(request, wanted)
    return Found(plans=(plan,), estimates=(plan,), refused=())


def write_document(file: Path, document: object) -> None:
    """Write a JSON document; a path that cannot be written is the caller's mistake."""
    try:
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None


def _wire_for(dtype: str) -> str:
    """Activations and keys go in the weights' format; with 4-bit weights in bf16."""
    formats.weight_bytes(dtype)
    return dtype if dtype in formats.WIRES else "bf16"


def _show(request: PlanRequest, found: Found, *, explained: bool) -> None:
    hardware = f"{request.num_gpus} x {request.hardware.name}"
    title = f"{request.model} in {request.defaults.dtype} on {hardware}, context {request.traffic.context:,}"
    show_columns(title, LAYOUT_COLUMNS, [_layout_cells(place, plan) for place, plan in enumerate(found.plans, 1)])
    parts = "microseconds of one layer and microbatch; gigabytes and busy shares of a GPU"
    show_columns(parts, TERM_COLUMNS, [_term_cells(place, plan) for place, plan in enumerate(found.plans, 1)])
    for note in notes(request):
        console.print(f"[yellow]{note}[/]")
    console.print(f"price {request.price:g} per device and hour" + _price_note(request), highlight=False)
    for sentence in explain(request, found.plans[0]) if explained else ():
        console.print(f"- {sentence}", markup=False, highlight=False)
    for reason, count in found.refused[:5] if explained else ():
        console.print(f"- {count} layouts refused, e.g. {reason}", markup=False, highlight=False)


def show_columns(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show numbers in narrow columns, the first row in bold."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        table.add_row(*row, style="bold" if place == 0 else "")
    console.print(table)


def _price_note(request: PlanRequest) -> str:
    return "" if request.price_per_hour is not None else f" ({PRICE_SOURCE})"


def _layout_cells(place: int, plan: Plan) -> list[str]:
    layout = plan.layout
    whole = (place, layout.groups, layout.stages, layout.ranks, layout.hosts, layout.slices, layout.replicas)
    return [
        *map(str, whole),
        *map(str, (layout.sequences, layout.microbatches, layout.num_gpus)),
        f"{1e3 * plan.step.step_s:.1f}",
        f"{plan.tokens_per_s:,.0f}",
        f"{plan.tokens_per_s_and_gpu:,.0f}",
        f"{plan.price_per_million_tokens:,.2f}",
    ]


def _term_cells(place: int, plan: Plan) -> list[str]:
    step, terms = plan.step, plan.step.terms
    parts_s = (terms.attention_s, terms.shared_s, terms.dispatch_s, terms.expert_s, terms.combine_s, step.layer_s)
    return [
        str(place),
        *(f"{1e6 * seconds:,.0f}" for seconds in (*parts_s, terms.exposed_s(step.microbatches))),
        f"{plan.memory.attention / 1e9:.0f}",
        f"{plan.memory.expert_weights / 1e9:.0f}",
        f"{step.attention_busy:.0%}",
        f"{step.expert_busy:.0%}",
    ]
