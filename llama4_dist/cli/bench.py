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
