"""The `llama4-dist bench` commands and their flags; the work is in the files bench_*."""

from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.flags import TlsCa, Token, parse_seconds

bench_app = typer.Typer(
    name="bench", help="Measure how fast a gateway, an engine, dispatch and a start are.", no_args_is_help=True
)

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there; - prints them.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.svg|png", help="Draw the figures (needs matplotlib).")
]
Model = Annotated[Path, typer.Option("--model", "-m", help="Checkpoint folder; runs in this process.")]
InputLen = Annotated[int, typer.Option(help="Tokens of each prompt, drawn at random.")]
OutputLen = Annotated[int, typer.Option(help="Tokens of each answer; end tokens are ignored.")]
Seed = Annotated[int, typer.Option(help="Draws prompts and send times; the same again repeats the load.")]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto, float32 or bfloat16.")]
Weights = Annotated[str, typer.Option(help="Format of linear weights: stored or int8.")]
Threads = Annotated[int | None, typer.Option("--num-threads", help="CPU threads of the attention side.")]


@bench_app.command()
def serve(
    address: Annotated[str, typer.Option("--address", "--server", "-s", help="host:port of a running gateway.")],
    rate: Annotated[float, typer.Option(help="Requests a second; inf sends all at once.")] = 1.0,
    rates: Annotated[str | None, typer.Option(help="Several rates one after the other, e.g. 1,2,4,8.")] = None,
    num_requests: Annotated[int, typer.Option(help="Requests of each rate, where no --duration is given.")] = 100,
    duration: Annotated[
        float | None,
        typer.Option(parser=parse_seconds, metavar="TIME", help="Send for so long at each rate, e.g. 20s."),
    ] = None,
    warmup: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="TIME", help="Leave requests sent before this out.")
    ] = "0s",  # type: ignore[assignment]
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    goodput: Annotated[str, typer.Option(help="Objectives in ms, e.g. ttft:500,tpot:50; also e2el.")] = "",
    burstiness: Annotated[float, typer.Option(help="1 is Poisson, smaller comes in bursts, inf evenly spaced.")] = 1.0,
    num_clients: Annotated[int, typer.Option(help="Client processes, when one cannot keep up.")] = 1,
    num_connections: Annotated[int, typer.Option(help="Connections of each client process.")] = 1,
    seed: Seed = 0,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM client certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM client key.")] = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Send requests to a gateway at given rates, whatever still runs, and show latencies and goodput.

    Latency counts from the time a request was to be sent. Metric names are those of vLLM's `bench serve`.
    """
    from llama4_dist.cli.bench_serve import ServeBench, run_bench_serve

    run_bench_serve(
        ServeBench(
            address=address,
            rates=rates if rates is not None else str(rate),
            num_requests=num_requests,
            duration_s=duration,
            warmup_s=warmup,
            input_len=input_len,
            output_len=output_len,
            goodput=goodput,
            burstiness=burstiness,
            num_clients=num_clients,
            num_connections=num_connections,
            seed=seed,
            token=token,
            tls_ca=tls_ca,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
        ),
        json_file,
        plot,
    )


@bench_app.command()
def latency(
    model: Model,
    batch_size: Annotated[int, typer.Option(help="Sequences that run together.")] = 1,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    num_iters: Annotated[int, typer.Option(help="Batches measured.")] = 5,
    num_iters_warmup: Annotated[int, typer.Option(help="Batches before them.")] = 1,
    dtype: Dtype = "auto",
    weights: Weights = "stored",
    num_threads: Threads = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Time one batch on an engine of this process: as a whole, to its first token, and step by step."""
    from llama4_dist.cli.bench_engine import EngineBench, run_bench_latency

    bench = EngineBench(
        model=model,
        number=batch_size,
        input_len=input_len,
        output_len=output_len,
        dtype=dtype,
        weights=weights,
        num_threads=num_threads,
        seed=seed,
        iterations=num_iters,
        warmups=num_iters_warmup,
    )
    run_bench_latency(bench, json_file)


@bench_app.command()
def throughput(
    model: Model,
    num_prompts: Annotated[int, typer.Option(help="Prompts, all given at once.")] = 64,
    input_len: InputLen = 64,
    output_len: OutputLen = 64,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time went, by station.")] = False,
    dtype: Dtype = "auto",
    weights: Weights = "stored",
    num_threads: Threads = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure tokens a second of an engine of this process that has all prompts at once."""
    from llama4_dist.cli.bench_engine import EngineBench, run_bench_throughput

    bench = EngineBench(
        model=model,
        number=num_prompts,
        input_len=input_len,
        output_len=output_len,
        dtype=dtype,
        weights=weights,
        num_threads=num_threads,
        seed=seed,
    )
    run_bench_throughput(bench, profile, json_file)


@bench_app.command()
def startup(
    model: Model,
    rounds: Annotated[int, typer.Option(help="Fresh processes.")] = 5,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Time a start in fresh processes: imports, opening the checkpoint, loading, the first token."""
    from llama4_dist.cli.bench_engine import run_bench_startup

    run_bench_startup(model, dtype, rounds, json_file)


@bench_app.command()
def dispatch(
    rows: Annotated[str, typer.Option(help="Rows of a round trip, several to compare.")] = "1,16,256",
    width: Annotated[int, typer.Option(help="Numbers of a row; 4 bytes each.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Turns of 20 round trips each.")] = 30,
    tcp: Annotated[bool, typer.Option("--tcp", help="TCP over loopback instead of Unix sockets.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Time rows to an expert host in another process and back, beside a bare socket echo of the same bytes."""
    from llama4_dist.cli.bench_engine import run_bench_dispatch

    run_bench_dispatch(rows, width, rounds, tcp, json_file)
