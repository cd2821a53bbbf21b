"""The commands and their flags; each command's work is in the file of its name."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.backend import Backend, Place
from llama4_dist.cli.bench import bench_app
from llama4_dist.cli.checkpoint import checkpoint_app, inspect
from llama4_dist.cli.cluster import cluster_app
from llama4_dist.cli.deploy import deploy_app
from llama4_dist.cli.experts import experts_app
from llama4_dist.cli.flag_groups import with_flag_groups
from llama4_dist.cli.flags import JsonFlag, TlsCa, parse_seconds
from llama4_dist.cli.planning import plan, simulate
from llama4_dist.cli.request_flags import ChatFlags, GenerateFlags, SamplingFlags
from llama4_dist.cli.serving import serve, serve_gateway

OWN_PACKAGES = ("llama4_dist", "cluster")

app = typer.Typer(
    name="llama4-dist",
    help="Distributed inference for Llama 4: experts on their own hosts, served over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app)
app.add_typer(checkpoint_app)
app.add_typer(cluster_app)
app.add_typer(deploy_app)
app.add_typer(experts_app)
app.command()(inspect)
app.command()(serve)
app.command("gateway")(serve_gateway)
app.command()(plan)
app.command()(simulate)


Period = Annotated[float | None, typer.Option(parser=parse_seconds, metavar="TIME")]


@app.command()
@with_flag_groups
def generate(flags: GenerateFlags, sampling: SamplingFlags, backend: Backend) -> None:
    """Continue prompts; the text streams to the terminal."""
    from llama4_dist.cli.generate import run_generate

    run_generate(flags, sampling, backend)


@app.command()
@with_flag_groups
def chat(flags: ChatFlags, sampling: SamplingFlags, backend: Backend) -> None:
    """Chat with a checkpoint or a running gateway."""
    from llama4_dist.cli.chat import run_chat

    run_chat(flags, sampling, backend)


@app.command()
@with_flag_groups
def tokenize(
    text: Annotated[str | None, typer.Argument(help="Text; '-' or none reads standard input.")] = None, *, place: Place
) -> None:
    """Show the tokens of a text."""
    from llama4_dist.cli.tokenize import run_tokenize

    run_tokenize(text, place)


@app.command()
def chaos(
    model: Annotated[Path, typer.Option("--model", "-m", help="Checkpoint folder.")],
    experts: Annotated[int, typer.Option(help="Expert hosts at the start.")] = 4,
    attention: Annotated[int, typer.Option(help="Attention workers.")] = 2,
    stages: Annotated[int, typer.Option(min=1, help="Pipeline stages of each attention worker.")] = 1,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of each stage.")] = 1,
    gateways: Annotated[int, typer.Option(help="Gateways; several are processes of their own.")] = 1,
    streams: Annotated[int, typer.Option(help="Requests running at once.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each request.")] = 48,
    duration: Annotated[float, typer.Option(parser=parse_seconds, metavar="TIME")] = "5m",  # type: ignore[assignment]
    kill_every: Period = "5s",  # type: ignore[assignment]
    stop_every: Period = None,
    scale_every: Period = "20s",  # type: ignore[assignment]
    kill_attention_every: Period = None,
    kill_stage_every: Period = None,
    kill_controller_every: Period = None,
    kill_gateway_every: Period = None,
    hosts: Annotated[str, typer.Option(help="Sizes that scaling goes through.")] = "6,3,4",
    seed: Annotated[int, typer.Option(help="Draws the schedule; the same again replays it.")] = 0,
    history: Annotated[Path | None, typer.Option(help="Keep the record of every token here.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Break a cluster of its own under load; exit with 1 when a request was lost or a token wrong. 0 = never."""
    from llama4_dist.chaos.run import ChaosOptions
    from llama4_dist.chaos.schedule import ChaosPlan
    from llama4_dist.cli.chaos import parse_hosts, run_chaos_command

    options = ChaosOptions(
        model=model,
        num_experts=experts,
        num_attention=attention,
        num_stages=stages,
        num_ranks=tensor,
        num_gateways=gateways,
        num_streams=streams,
        max_tokens=max_tokens,
    )

    def plan() -> ChaosPlan:
        return ChaosPlan(
            duration_s=duration,
            kill_every_s=kill_every or None,
            stop_every_s=stop_every or None,
            scale_every_s=scale_every or None,
            kill_attention_every_s=kill_attention_every or None,
            kill_stage_every_s=kill_stage_every or None,
            kill_controller_every_s=kill_controller_every or None,
            kill_gateway_every_s=kill_gateway_every or None,
            hosts=parse_hosts(hosts),
            seed=seed,
        )

    run_chaos_command(options, plan, history, as_json)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Check this machine: packages, cores, memory, GPUs, ports."""
    from llama4_dist.cli.doctor import run_doctor

    run_doctor(as_json)


@app.command()
def health(
    server: Annotated[str, typer.Option("--server", "-s", help="host:port of a gateway or an admin port.")],
    condition: Annotated[str, typer.Option(help="liveness, readiness or startup.")] = "readiness",
    tls_ca: TlsCa = None,
    tls_server_name: Annotated[str | None, typer.Option(help="Name in the certificate, where not the host's.")] = None,
    wait: Period = "0s",  # type: ignore[assignment]
    as_json: JsonFlag = False,
) -> None:
    """Ask a server for one of its health conditions, for up to `--wait`; exit with 4 when it is off. Needs no token."""
    from llama4_dist.cli.health import run_health

    run_health(server, condition, tls_ca=tls_ca, tls_server_name=tls_server_name, wait_s=wait or 0.0, as_json=as_json)


@app.command()
def version(as_json: JsonFlag = False) -> None:
    """Print the version."""
    from llama4_dist.cli.output import print_json
    from llama4_dist.version import __version__

    if as_json:
        print_json({"version": __version__})
    else:
        print(__version__)


def main() -> None:
    """Run the command line; a command whose extra is not installed says which."""
    try:
        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN_PACKAGES:
            raise
        from llama4_dist.cli.output import EXIT_USAGE, error_console

        error_console.print("[bold red]error:[/]", end=" ")
        remedy = f"this command needs {package}, which is not installed: pip install 'llama4-dist[serve]'"
        error_console.print(remedy, markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_USAGE)
