"""What `plan` and `simulate` are told on the command line; nothing of the planner is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.flags import JsonFlag, parse_seconds

PICTURE = "FILE.svg|png"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFlags:
    """What is planned, for `plan` and `simulate`; None is left to the planner."""

    model: Annotated[str, typer.Option("--model", "-m", help="behemoth, maverick, scout, or a checkpoint folder.")]
    hardware: Annotated[str, typer.Option(help="Devices and their kind, e.g. 96xH200.")]
    dtype: Annotated[
        str,
        typer.Option(help="Format of weights: fp8, bf16, int8, int4 (CPU: float32); auto: a folder's own, else fp8."),
    ] = "auto"
    wire: Annotated[str, typer.Option(help="Format of rows on the wire; auto is the weights'.")] = "auto"
    kv_dtype: Annotated[str, typer.Option(help="Format of the KV cache; auto is the weights'.")] = "auto"
    link: Annotated[str, typer.Option(help="Between attention and experts: nic or nvlink.")] = "nic"
    context: Annotated[int, typer.Option(help="Positions cached per sequence.")] = 8192
    batch: Annotated[
        int | None, typer.Option(help="Sequences the whole cluster decodes together; default: the best.")
    ] = None
    slo_tpot_s: Annotated[
        float | None, typer.Option("--slo-tpot", parser=parse_seconds, metavar="TIME", help="Longest time per token.")
    ] = None
    objective: Annotated[str, typer.Option(help="throughput, latency or cost.")] = "throughput"
    layout: Annotated[
        str | None, typer.Option(help="Judge this one: P=1,T=8,groups=8,hosts=32,slices=2,batch=512,m=2.")
    ] = None
    replicas: Annotated[int, typer.Option(help="Copies of every expert slice; one serves, others stand by.")] = 1
    skew: Annotated[float, typer.Option(help="Zipf exponent of experts' popularity; 0 is uniform.")] = 0.0
    loads: Annotated[Path | None, typer.Option(help="JSON array of measured loads, one for each expert.")] = None
    pooled: Annotated[
        bool, typer.Option("--pooled/--loose", help="Whether groups reach a layer together at the hosts.")
    ] = True
    measured_rates: Annotated[
        bool, typer.Option("--measured", help="Memory and products as measured on such a device.")
    ] = False
    alpha_us: Annotated[float, typer.Option(help="Fixed cost of a message one way, in microseconds.")] = 10.0
    memory_share: Annotated[float, typer.Option(help="Share of a device's memory that a plan may use.")] = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOutput:
    """How much of the answer `plan` shows, and where it goes."""

    explain: Annotated[bool, typer.Option("--explain", help="Say what binds, and what was refused.")] = False
    top: Annotated[int, typer.Option(help="Layouts to show.")] = 5
    chart: Annotated[Path | None, typer.Option(metavar=PICTURE, help="Draw layers and the frontier.")] = None
    file: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write the plan there too.")] = None
    as_json: JsonFlag = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """What comes when in a simulation, and what happens meanwhile."""

    rate: Annotated[float, typer.Option(help="Requests a second, a Poisson process.")] = 1.0
    duration_s: Annotated[
        float,
        typer.Option(
            "--duration", parser=parse_seconds, metavar="TIME", show_default="60s", help="Requests come so long."
        ),
    ] = 60.0
    drain_s: Annotated[
        float,
        typer.Option(
            "--drain",
            parser=parse_seconds,
            metavar="TIME",
            show_default="0s",
            help="Run on so long after the last may come.",
        ),
    ] = 0.0
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt, on average.")] = 1024
    output_len: Annotated[int, typer.Option(help="Tokens of an answer, on average.")] = 256
    spread: Annotated[float, typer.Option(help="Lengths are uniform within this share of the average.")] = 0.5
    trace: Annotated[Path | None, typer.Option(help="JSON lines of at_s, prompt_len, output_len instead.")] = None
    events: Annotated[
        list[str] | None, typer.Option("--event", help="kill:HOST@SECONDS or scale:HOSTS@SECONDS; repeat.")
    ] = None
    detect_s: Annotated[
        float,
        typer.Option(
            "--detect", parser=parse_seconds, metavar="TIME", show_default="20ms", help="From a death to resending."
        ),
    ] = 0.02
    respawn_s: Annotated[
        float,
        typer.Option(
            "--respawn",
            parser=parse_seconds,
            metavar="TIME",
            show_default="10s",
            help="To start a process, without its weights.",
        ),
    ] = 10.0
    source: Annotated[str, typer.Option(help="Where weights come from: peer, nvlink, host, storage.")] = "peer"
    max_num_batched_tokens: Annotated[int, typer.Option(help="Token budget of a step.")] = 2048
    seed: Annotated[int, typer.Option(help="Draws the load; the same again repeats the run.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOutput:
    """Where the figures of a simulation go."""

    chart: Annotated[Path | None, typer.Option(metavar=PICTURE, help="Draw the run over its time.")] = None
    file: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write all figures there too.")] = None
    as_json: JsonFlag = False
