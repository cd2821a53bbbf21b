"""Settings of `llama4-dist serve`: YAML file < environment `LLAMA4_DIST_*` < flags; knows neither torch nor gRPC.

Unknown keys, unknown `LLAMA4_DIST_*` variables and contradictory values are refused by name (`ConfigError`).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llama4_dist.errors import ConfigError
from llama4_dist.partition import Partition
from llama4_dist.settings_file import read_yaml
from llama4_dist.telemetry.settings import Telemetry

ENV_PREFIX = "LLAMA4_DIST_"
# Read by other parts of the program, not by this file's model.
OTHER_VARIABLES = frozenset(
    {
        "LLAMA4_DIST_CLUSTER_SECRET_FILE",
        "LLAMA4_DIST_LOG_LEVEL",
        "LLAMA4_DIST_MACHINE",
        "LLAMA4_DIST_NATIVE",
        "LLAMA4_DIST_NATIVE_LIBRARY",
        "LLAMA4_DIST_TOKEN",
    }
)


class ServeSettings(BaseModel):
    """Everything `serve` can be told. Sizes are bytes, times seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    model: Path = Field(description="checkpoint folder")
    model_name: str = Field(default="", description="name clients use; default: the folder's name", max_length=128)
    experts: int = Field(default=0, ge=0, le=4096, description="expert host processes; 0 = one process, no Ray")
    attention: int = Field(default=1, ge=1, le=256, description="attention workers")
    autoscale_max: int | None = Field(
        default=None, ge=1, le=4096, description="most expert hosts; default: no autoscaling"
    )
    autoscale_min: int = Field(default=1, ge=1, le=4096, description="fewest expert hosts, with autoscale_max")
    replicas: int = Field(default=2, ge=1, le=64, description="copies of every expert, where memory allows")
    expert_slices: int = Field(
        default=1, ge=1, le=1024, description="slices every expert is cut into, each held by hosts of its own"
    )
    stages: int = Field(
        default=1, ge=1, le=1024, description="pipeline stages the layers of an attention worker are cut into"
    )
    tensor: int = Field(
        default=1, ge=1, le=64, description="tensor-parallel ranks each stage is cut into; their number changes tokens"
    )
    host_capacity_bytes: int | None = Field(
        default=None, ge=1, description="expert weights one host may hold, in bytes"
    )
    expert_memory_bytes: int | None = Field(
        default=None, ge=1, description="expert weights that stay in memory, of each host; others are read on demand"
    )
    pool_window_s: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how long an expert host lets rows wait for other attention workers' rows of the layer, at most",
    )
    wire: Literal["", "bfloat16", "float8_e4m3"] = Field(
        default="", description="how rows travel between processes; default: as the model computes. Changes tokens"
    )
    expert_timeout_s: float = Field(
        default=30.0, ge=0, le=3600, description="how long requests wait for an expert that no host serves"
    )
    resume_ttl_s: float = Field(
        default=10.0, ge=0, le=3600, description="how long a request outlives its gateway, to be resumed on another"
    )
    replay_timeout_s: float = Field(
        default=30.0, ge=0, le=3600, description="how long a request waits for an attention worker when its own is lost"
    )
    start_timeout_s: float = Field(
        default=300.0, gt=0, le=86400, description="how long all workers together may take to start and load"
    )
    placement_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        description="how long a worker waits for room on a node of Ray",
    )
    demand_roles: bool = Field(
        default=False, description="workers wait for nodes with their role's resource, where none has come yet"
    )
    directory_timeout_s: float = Field(
        default=60.0, gt=0, le=86400, description="how long a gateway waits at its start for the cluster to serve"
    )
    ray_address: str | None = Field(default=None, description="existing Ray cluster; default: start one here")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["stored", "int8"] = Field(
        default="stored", description="format of linear weights; int8 changes tokens and needs a processor"
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    num_threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of the attention side")

    gateway: bool = Field(default=True, description="serve clients from this process too")
    admin_address: str = Field(default="127.0.0.1:50052", description="host:port of ClusterService; port 0 picks one")
    admin_token_file: Path | None = Field(default=None, description="bearer tokens of operators, one a line")
    directory_address: str | None = Field(default=None, description="host:port where other gateways find the engines")
    directory: str | None = Field(default=None, description="be a gateway only: host:port of a cluster's directory")

    address: str = Field(default="127.0.0.1:50051", description="host:port of the gateway; port 0 picks one")
    token_file: Path | None = Field(default=None, description="bearer tokens, one a line")
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = Field(default=None, description="require client certificates of this CA")
    reuse_port: bool = Field(default=False, description="share the port with other gateways of this machine")
    reflection: bool = True
    metrics_address: str | None = Field(default=None, description="host:port for Prometheus; port 0 picks one")
    metrics_token_file: Path | None = Field(
        default=None, description="bearer tokens of those who scrape, one a line; needed beyond loopback"
    )
    expert_metrics: bool = Field(default=False, description="export a series for each expert of each layer")
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, le=256 * 1024 * 1024)
    drain_timeout_s: float = Field(default=30.0, gt=0, le=3600, allow_inf_nan=False)
    max_request_s: float = Field(default=600.0, gt=0, le=86400, allow_inf_nan=False)

    max_num_seqs: int = Field(default=256, ge=1, le=65536)
    max_num_batched_tokens: int = Field(default=2048, ge=1, le=1048576)
    max_waiting: int = Field(default=1024, ge=1, le=1048576)
    max_queue_s: float | None = Field(
        default=None, gt=0, le=86400, description="refuse a request that would wait longer for its first token"
    )
    max_context: int | None = Field(default=None, ge=1)
    block_size: int = Field(default=16, ge=1, le=1024)
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    kv_dtype: Literal["auto", "float32", "bfloat16", "float8_e4m3"] = "auto"
    prefix_caching: bool = True
    max_decode_slowdown: float = Field(default=2.0, ge=1.0)
    num_microbatches: Literal[1, 2] | None = Field(
        default=None, description="parts of a step that take turns while experts compute; chosen, if left out"
    )
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    trace_endpoint: str = Field(
        default="", pattern=r"^(https?://\S+)?$", description="URL of an OTLP collector; default: no traces"
    )
    trace_ratio: float = Field(
        default=1.0, ge=0, le=1, description="share of requests traced, of those whose caller did not decide"
    )

    @property
    def telemetry(self) -> Telemetry:
        """How every process of the deployment logs and traces."""
        return Telemetry(
            log_level=self.log_level,
            log_format=self.log_format,
            trace_endpoint=self.trace_endpoint,
            trace_ratio=self.trace_ratio,
        )

    @property
    def partition(self) -> Partition:
        """How the attention side is cut."""
        return Partition(num_stages=self.stages, num_ranks=self.tensor)

    @model_validator(mode="after")
    def _check_together(self) -> "ServeSettings":
        host_and_port(self.address)
        if self.metrics_address is not None:
            host_and_port(self.metrics_address)
            if self.metrics_address == self.address and not self.address.endswith(":0"):
                raise ValueError(f"metrics_address {self.metrics_address} is the gateway's own: choose another port")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.wire and self.experts == 0:
            raise ValueError(f"wire={self.wire!r} needs experts >= 1: without expert hosts no row travels")
        if self.ray_address is not None and self.experts == 0:
            raise ValueError("ray_address needs experts >= 1: without expert hosts nothing runs on Ray")
        if self.attention > 1 and self.experts == 0:
            raise ValueError(f"attention={self.attention} needs experts >= 1: one process holds one attention worker")
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> "ServeSettings":
        host_and_port(self.admin_address)
        for name in ("directory_address", "directory"):
            if (address := getattr(self, name)) is not None:
                host_and_port(address)
        if self.directory is not None and (self.experts or self.directory_address):
            raise ValueError("directory names another process's cluster: leave experts and directory_address out")
        if self.autoscale_max is not None and not self.autoscale_min <= self.experts <= self.autoscale_max:
            raise ValueError(f"experts={self.experts} must lie between autoscale_min and autoscale_max")
        if self.directory_address is not None and self.experts == 0:
            raise ValueError("directory_address needs experts >= 1: one process has no engines to be found")
        if not self.gateway and self.directory_address is None:
            raise ValueError("gateway is off and directory_address not given: nobody could be served")
        return self


def host_and_port(address: str) -> tuple[str, int]:
    """Split "host:port", IPv6 in brackets; raise ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"address {address!r} is not host:port with a port of 0..65535")
    return host.strip("[]"), int(port)


def load_settings(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServeSettings:
    """Merge file, environment and flags (None = not given). Raise ConfigError naming every wrong field."""
    values: dict[str, Any] = {}
    if file is not None:
        values.update(read_yaml(file))
    values.update(read_environment(os.environ if environ is None else environ))
    values.update({name: value for name, value in flags.items() if value is not None})
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(item) for item in error.errors())) from None


def _describe(item: Mapping[str, Any]) -> str:
    field = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{field}: no such setting; `llama4-dist serve --help` lists them"
    return f"{field}: {message} (got {item['input']!r})" if field else message


def read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Take `LLAMA4_DIST_*`; a variable that names no setting is a typo and raises ConfigError."""
    values: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES:
            continue
        field = name.removeprefix(ENV_PREFIX).lower()
        if field not in ServeSettings.model_fields:
            raise ConfigError(f"environment variable {name} names no setting: unset it or correct the name")
        values[field] = value
    return values
