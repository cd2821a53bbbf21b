"""The commands that serve clients, and their flags; the work is in `serve`."""

from pathlib import Path
from typing import Annotated

import typer

from llama4_dist.cli.flags import DtypeChoice, ExpertMemory, JsonFlag, WeightsChoice

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
Address = Annotated[str | None, typer.Option(help="host:port of the gateway [127.0.0.1:50051].")]
ModelName = Annotated[str | None, typer.Option(help="Name clients use; default: the folder's.")]
TokenFile = Annotated[Path | None, typer.Option(help="Bearer tokens, one a line.")]
TlsCertificate = Annotated[Path | None, typer.Option(help="PEM certificate chain.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM private key.")]
TlsClientCa = Annotated[Path | None, typer.Option(help="Require client certificates of this CA.")]
MetricsAddress = Annotated[str | None, typer.Option(help="host:port for Prometheus.")]
MetricsTokenFile = Annotated[Path | None, typer.Option(help="Tokens of those who scrape; needed beyond loopback.")]
MaxWaiting = Annotated[int | None, typer.Option(help="Requests that may wait.")]
LogFormat = Annotated[str | None, typer.Option(help="text or json.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]
TraceEndpoint = Annotated[str | None, typer.Option(help="URL of an OTLP collector, e.g. http://127.0.0.1:4317.")]
TraceRatio = Annotated[float | None, typer.Option(help="Share of requests traced, where the caller did not decide.")]
MaxQueue = Annotated[
    float | None, typer.Option(help="Refuse a request that would wait longer for its first token, in seconds.")
]
ReusePort = Annotated[
    bool | None, typer.Option("--reuse-port", help="Share the port with other gateways of this machine.")
]


def serve(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder.")] = None,
    config: ConfigFile = None,
    address: Address = None,
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
    model_name: ModelName = None,
    token_file: TokenFile = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    metrics_address: MetricsAddress = None,
    metrics_token_file: MetricsTokenFile = None,
    expert_metrics: Annotated[
        bool | None, typer.Option("--expert-metrics", help="Export a series for each expert of each layer.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences running at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    max_waiting: MaxWaiting = None,
    max_queue_s: MaxQueue = None,
    reuse_port: ReusePort = None,
    max_context: Annotated[int | None, typer.Option(help="Longest prompt + answer, in tokens.")] = None,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Memory of the KV cache, in bytes.")] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    trace_endpoint: TraceEndpoint = None,
    trace_ratio: TraceRatio = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve a checkpoint over gRPC, in one process or with expert hosts on Ray."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    from llama4_dist.cli.serve import run_serve

    run_serve(flags, config, as_json)


def serve_gateway(
    directory: Annotated[str, typer.Option(help="host:port of the cluster's directory.")],
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder, for its tokenizer.")] = None,
    config: ConfigFile = None,
    address: Address = None,
    model_name: ModelName = None,
    token_file: TokenFile = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    metrics_address: MetricsAddress = None,
    metrics_token_file: MetricsTokenFile = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests at once, with max_waiting.")] = None,
    max_waiting: MaxWaiting = None,
    max_queue_s: MaxQueue = None,
    reuse_port: ReusePort = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    trace_endpoint: TraceEndpoint = None,
    trace_ratio: TraceRatio = None,
    as_json: JsonFlag = False,
) -> None:
    """Be one more gateway of a cluster that another process serves; clients may change between gateways."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    from llama4_dist.cli.serve import run_serve

    run_serve(flags, config, as_json)
