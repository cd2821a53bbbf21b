"""The flags of `plan` and `simulate`; their work is in the files of these names."""

from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.flags import JsonFlag, parse_seconds

Model = Annotated[str, typer.Option("--model", "-m", help="behemoth, maverick, scout, or a checkpoint folder.")]
HardwareFlag = Annotated[str, typer.Option("--hardware", help="Devices and their kind, e.g. 96xH200.")]
Dtype = Annotated[
    str, typer.Option(help="Format of weights: fp8, bf16, int8, int4 (CPU: float32); auto: a folder's own, else fp8.")
]
Wire = Annotated[str, typer.Option("--wire", help="Format of rows on the wire; auto is the weights'.")]
KvDtype = Annotated[str, typer.Option("--kv-dtype", help="Format of the KV cache; auto is the weights'.")]
Link = Annotated[str, typer.Option(help="Between attention and experts: nic or nvlink.")]
Context = Annotated[int, typer.Option(help="Positions cached per sequence.")]
Batch = Annotated[int | None, typer.Option(help="Sequences the whole cluster decodes together; default: the best.")]
Slo = Annotated[
    float | None, typer.Option("--slo-tpot", parser=parse_seconds, metavar="TIME", help="Longest time per token.")
]
ObjectiveFlag = Annotated[str, typer.Option("--objective", help="throughput, latency or cost.")]
LayoutFlag = Annotated[
    str | None, typer.Option("--layout", help="Judge this one: P=1,T=8,groups=8,hosts=32,slices=2,batch=512,m=2.")
]
Replicas = Annotated[int, typer.Option(help="Copies of every expert slice; one serves, others stand by.")]
Price = Annotated[float | None, typer.Option(help="Of a device and hour; default: an example figure.")]
Skew = Annotated[float, typer.Option(help="Zipf exponent of experts' popularity; 0 is uniform.")]
Loads = Annotated[Path | None, typer.Option(help="JSON array of measured loads, one for each expert.")]
Pooled = Annotated[bool, typer.Option("--pooled/--loose", help="Whether groups reach a layer together at the hosts.")]
Measured = Annotated[bool, typer.Option("--measured", help="Memory and products as measured on such a device.")]
Alpha = Annotated[float, typer.Option("--alpha-us", help="Fixed cost of a message one way, in microseconds.")]
MemoryShare = Annotated[float, typer.Option(help="Share of a device's memory that a plan may use.")]


def plan(
    model: Model,
    hardware: HardwareFlag,
    dtype: Dtype = "auto",
    wire: Wire = "auto",
    kv_dtype: KvDtype = "auto",
    link: Link = "nic",
    context: Context = 8192,
    batch: Batch = None,
    slo_tpot: Slo = None,
    objective: ObjectiveFlag = "throughput",
    layout: LayoutFlag = None,
    replicas: Replicas = 1,
    price: Price = None,
    skew: Skew = 0.0,
    loads: Loads = None,
    pooled: Pooled = True,
    measured: Measured = False,
    alpha_us: Alpha = 10.0,
    memory_share: MemoryShare = 0.95,
    explain: Annotated[bool, typer.Option("--explain", help="Say what binds, and what was refused.")] = False,
    top: Annotated[int, typer.Option(help="Layouts to show.")] = 5,
    chart: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE.svg|png", help="Draw layers and the frontier.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write the plan there too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the best layout of a cluster for a model, or judge one; figures are computed, not measured."""
    from llama4_dist.cli.plan import PlanFlags, PlanOutput, run_plan

    flags = PlanFlags(
        model=model,
        hardware=hardware,
        dtype=dtype,
        wire=wire,
        kv_dtype=kv_dtype,
        link=link,
        context=context,
        batch=batch,
        slo_tpot_s=slo_tpot,
        objective=objective,
        layout=layout,
        replicas=replicas,
        price=price,
        skew=skew,
        loads=loads,
        pooled=pooled,
        measured_rates=measured,
        alpha_us=alpha_us,
        memory_share=memory_share,
    )
    run_plan(flags, PlanOutput(explain=explain, top=top, chart=chart, file=out, as_json=as_json))


def simulate(
    model: Model,
    hardware: HardwareFlag,
    rate: Annotated[float, typer.Option(help="Requests a second, a Poisson process.")] = 1.0,
    duration: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="TIME", help="Requests come so long.")
    ] = "60s",  # type: ignore[assignment]
    drain: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="TIME", help="Run on so long after the last may come.")
    ] = "0s",  # type: ignore[assignment]
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt, on average.")] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer, on average.")] = 256,
    spread: Annotated[float, typer.Option(help="Lengths are uniform within this share of the average.")] = 0.5,
    trace: Annotated[Path | None, typer.Option(help="JSON lines of at_s, prompt_len, output_len instead.")] = None,
    event: Annotated[list[str] | None, typer.Option(help="kill:HOST@SECONDS or scale:HOSTS@SECONDS; repeat.")] = None,
    detect: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="TIME", help="From a death to resending.")
    ] = "20ms",  # type: ignore[assignment]
    respawn: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="TIME", help="To start a process, without its weights.")
    ] = "10s",  # type: ignore[assignment]
    source: Annotated[str, typer.Option(help="Where weights come from: peer, nvlink, host, storage.")] = "peer",
    max_num_batched_tokens: Annotated[int, typer.Option(help="Token budget of a step.")] = 2048,
    seed: Annotated[int, typer.Option(help="Draws the load; the same again repeats the run.")] = 0,
    dtype: Dtype = "auto",
    wire: Wire = "auto",
    kv_dtype: KvDtype = "auto",
    link: Link = "nic",
    context: Context = 8192,
    batch: Batch = None,
    slo_tpot: Slo = None,
    objective: ObjectiveFlag = "throughput",
    layout: LayoutFlag = None,
    replicas: Replicas = 1,
    skew: Skew = 0.0,
    loads: Loads = None,
    pooled: Pooled = True,
    measured: Measured = False,
    alpha_us: Alpha = 10.0,
    memory_share: MemoryShare = 0.95,
    chart: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE.svg|png", help="Draw the run over its time.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write all figures there too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve a load on a planned cluster in simulated time, hosts dying and coming as told."""
    from llama4_dist.cli.plan import PlanFlags
    from llama4_dist.cli.simulate import LoadFlags, run_simulate

    flags = PlanFlags(
        model=model,
        hardware=hardware,
        dtype=dtype,
        wire=wire,
        kv_dtype=kv_dtype,
        link=link,
        context=context,
        batch=batch,
        slo_tpot_s=slo_tpot,
        objective=objective,
        layout=layout,
        replicas=replicas,
        price=None,
        skew=skew,
        loads=loads,
        pooled=pooled,
        measured_rates=measured,
        alpha_us=alpha_us,
        memory_share=memory_share,
    )
    load = LoadFlags(
        rate=rate,
        duration_s=duration,
        drain_s=drain,
        prompt_len=prompt_len,
        output_len=output_len,
        spread=spread,
        trace=trace,
        events=tuple(event or ()),
        detect_s=detect,
        respawn_s=respawn,
        source=source,
        max_num_batched_tokens=max_num_batched_tokens,
        seed=seed,
    )
    run_simulate(flags, load, chart=chart, file=out, as_json=as_json)
