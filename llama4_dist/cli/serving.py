"""The commands that serve clients, and their flags; the work is in `serve`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.flag_groups import with_flag_groups
from llama4_dist.cli.flags import DtypeChoice, ExpertMemory, JsonFlag, WeightsChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayFlags:
    """Settings of whoever serves clients; None leaves one to the file, the environment or its default."""

    address: Annotated[str | None, typer.Option(help="host:port of the gateway [127.0.0.1:50051].")] = None
    model_name: Annotated[str | None, typer.Option(help="Name clients use; default: the folder's.")] = None
    token_file: Annotated[Path | None, typer.Option(help="Bearer tokens, one a line.")] = None
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM certificate chain.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None
    tls_client_ca: Annotated[Path | None, typer.Option(help="Require client certificates of this CA.")] = None
    metrics_address: Annotated[str | None, typer.Option(help="host:port for Prometheus.")] = None
    metrics_token_file: Annotated[
        Path | None, typer.Option(help="Tokens of those who scrape; needed beyond loopback.")
    ] = None
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may wait.")] = None
    max_queue_s: Annotated[
        float | None, typer.Option(help="Refuse a request that would wait longer for its first token, in seconds.")
    ] = None
    reuse_port: Annotated[
        bool | None, typer.Option("--reuse-port", help="Share the port with other gateways of this machine.")
    ] = None
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None
    trace_endpoint: Annotated[
        str | None, typer.Option(help="URL of an OTLP collector, e.g. http://127.0.0.1:4317.")
    ] = None
    trace_ratio: Annotated[
        float | None, typer.Option(help="Share of requests traced, where the caller did not decide.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where settings come from besides flags, and how the command answers."""

    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")] = None
    as_json: JsonFlag = False


@with_flag_groups
def serve(
    *,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder.")] = None,
    experts: Annotated[int | None, typer.Option(help="Expert host processes; 0 = one process, no Ray.")] = None,
    attention: Annotated[int | None, typer.Option(help="Attention workers.")] = None,
    autoscale_max: Annotated[int | None, typer.Option(help="Most expert hosts; without it none come or go.")] = None,
    autoscale_min: Annotated[int | None, typer.Option(help="Fewest expert hosts [1].")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of every expert, where memory allows [2].")] = None,
    expert_slices: Annotated[int | None, typer.Option(help="Slices every expert is cut into [1].")] = None,
    stages: Annotated[int | None, typer.Option(help="Pipeline stages of each attention worker [1].")] = None,
    tensor: Annotated[int | None, typer.Option(help="Tensor-parallel ranks of each stage [1].")] = None,
    expert_memory_bytes: ExpertMemory = None,
    gateway: Annotated[bool | None, typer.Option(help="Serve clients from this process too.")] = None,
    admin_address: Annotated[str | None, typer.Option(help="host:port of ClusterService [127.0.0.1:50052].")] = None,
    admin_token_file: Annotated[Path | None, typer.Option(help="Bearer tokens of operators.")] = None,
    directory_address: Annotated[str | None, typer.Option(help="host:port where other gateways find engines.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Existing Ray cluster; default: start one here.")] = None,
    dtype: Annotated[DtypeChoice | None, typer.Option(help="Compute dtype.")] = None,
    weights: Annotated[
        WeightsChoice | None, typer.Option(help="Format of linear weights [stored]; int8 changes tokens.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads of the attention side.")] = None,
    expert_metrics: Annotated[
        bool | None, typer.Option("--expert-metrics", help="Export a series for each expert of each layer.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences running at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Longest prompt + answer, in tokens.")] = None,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Memory of the KV cache, in bytes.")] = None,
    clients: GatewayFlags,
    source: Source,
) -> None:
    """Serve a checkpoint over gRPC, in one process or with expert hosts on Ray."""
    own = {name: value for name, value in locals().items() if name not in ("clients", "source")}
    from llama4_dist.cli.serve import run_serve

    run_serve({**own, **asdict(clients)}, source.config, source.as_json)


@with_flag_groups
def serve_gateway(
    *,
    directory: Annotated[str, typer.Option(help="host:port of the cluster's directory.")],
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder, for its tokenizer.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests at once, with max_waiting.")] = None,
    clients: GatewayFlags,
    source: Source,
) -> None:
    """Be one more gateway of a cluster that another process serves; clients may change between gateways."""
    own = {name: value for name, value in locals().items() if name not in ("clients", "source")}
    from llama4_dist.cli.serve import run_serve

    run_serve({**own, **asdict(clients)}, source.config, source.as_json)
