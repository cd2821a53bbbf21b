"""`llama4-dist simulate`: a load on a planned cluster in simulated time; nothing is started, nothing is measured."""

from dataclasses import asdict, replace
from typing import Any

from llama4_dist.cli.bench_report import counting, shown
from llama4_dist.cli.output import console, print_json, print_pairs, reporting
from llama4_dist.cli.plan import find_plans, request_of, write_document
from llama4_dist.cli.plan_flags import LoadFlags, PlanFlags, SimulationOutput
from llama4_dist.errors import ConfigError
from llama4_dist.planner.chart import check_chart
from llama4_dist.planner.document import layout_document, notes
from llama4_dist.planner.plan import Plan, context_limit
from llama4_dist.planner.recovery import SOURCES
from llama4_dist.planner.request import PlanRequest
from llama4_dist.simulator.chart import draw_run
from llama4_dist.simulator.load import Arrival, check_fits, draw, read_trace
from llama4_dist.simulator.result import SCHEMA, SimulationResult
from llama4_dist.simulator.scenario import Scenario, parse_events
from llama4_dist.simulator.simulate import simulate

SHOWN = (
    "completed", "unfinished", "request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms",
    "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "median_e2el_ms", "preemptions",
    "attention_busy", "expert_busy",
)  # fmt: skip


def run_simulate(flags: PlanFlags, load: LoadFlags, output: SimulationOutput) -> None:
    """Plan or take the layout given, run the load through it, and show what clients and GPUs would see."""
    with reporting(output.as_json):
        check_chart(output.chart)
        if load.source not in SOURCES:
            raise ConfigError(f"source={load.source!r} holds no weights: choose one of {', '.join(SOURCES)}")
        if not 1 <= load.max_num_batched_tokens <= 1 << 20:
            raise ConfigError(f"max_num_batched_tokens={load.max_num_batched_tokens} must be from 1 to {1 << 20}")
        request = request_of(flags)
        plan = find_plans(request, flags.layout, top=1).plans[0]
        arrivals, scenario = _arrivals(load), _scenario(load, plan)
        check_fits(arrivals, _longest(request, plan))
        with counting("Simulating", round(scenario.duration_s), quiet=output.as_json) as count:
            result = simulate(
                request,
                plan,
                arrivals,
                scenario,
                max_num_batched_tokens=load.max_num_batched_tokens,
                on_progress=lambda now_s: count(int(now_s)),
            )
        document = simulation_document(request, plan, scenario, result)
        if output.file is not None:
            write_document(output.file, document)
        if output.chart is not None:
            draw_run(output.chart, result, f"{request.model} on {request.hardware.name}: {plan.layout.describe()}")
    if output.as_json:
        print_json(document)
        return
    _show(request, plan, scenario, result)


def simulation_document(
    request: PlanRequest, plan: Plan, scenario: Scenario, result: SimulationResult
) -> dict[str, Any]:
    """Return the document `llama4_dist.simulation/1`: the layout, the scenario, figures and the time line."""
    return {
        "schema": SCHEMA,
        "notes": notes(request),
        "model": request.model,
        "synthetic": request.synthetic,
        "hardware": request.hardware.name,
        "layout": layout_document(plan.layout),
        "scenario": asdict(scenario),
        "figures": {"measured": False, **result.summary(scenario.duration_s)},
        "happened": [{"at_s": at_s, "what": text} for at_s, text in result.happened],
        "timeline": result.rows(),
    }


def _arrivals(load: LoadFlags) -> tuple[Arrival, ...]:
    if load.trace is not None:
        return read_trace(load.trace)
    return draw(
        rate=load.rate,
        duration_s=load.duration_s,
        prompt_len=load.prompt_len,
        output_len=load.output_len,
        spread=load.spread,
        seed=load.seed,
    )


def _scenario(load: LoadFlags, plan: Plan) -> Scenario:
    return Scenario(
        duration_s=load.duration_s + load.drain_s,
        events=parse_events(load.events or (), plan.layout.hosts),
        detect_s=load.detect_s,
        respawn_s=load.respawn_s,
        source=load.source,
        seed=load.seed,
    )


def _longest(request: PlanRequest, plan: Plan) -> int:
    """Return the longest request that a group alone can hold: its pages for one sequence, and the model's positions."""
    alone = replace(plan, layout=replace(plan.layout, sequences=1))
    return context_limit(request, alone)


def _show(request: PlanRequest, plan: Plan, scenario: Scenario, result: SimulationResult) -> None:
    summary = result.summary(scenario.duration_s)
    title = f"{request.model} on {request.hardware.name}: {plan.layout.describe()}"
    print_pairs(title, {name: shown(summary[name]) for name in SHOWN})
    for at_s, text in result.happened:
        console.print(f"{at_s:8.1f} s  {text}", markup=False, highlight=False)
    for note in notes(request):
        console.print(f"[yellow]{note}[/]")
