"""`llama4-dist serve`: settings in, a gateway over an engine out; shows what was started and stops on a signal."""

import asyncio
import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llama4_dist.checkpoint.describe import CheckpointSummary
from llama4_dist.cli.inspect import summary_rows
from llama4_dist.cli.local import engine_of, open_text
from llama4_dist.cli.logs import configure_logging
from llama4_dist.cli.output import human_bytes, print_json, print_pairs, print_rows, reporting
from llama4_dist.engine.port import Engine
from llama4_dist.gateway.run import Gateway, serve
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from llama4_dist.settings import ServeSettings, load_settings

log = logging.getLogger(__name__)


def run_serve(flags: Mapping[str, Any], file: Path | None, as_json: bool) -> None:
    """Serve until SIGTERM or SIGINT. With `as_json` one line tells the address once the gateway answers."""
    with reporting(as_json), ExitStack() as resources:
        settings = load_settings(flags, file=file)
        configure_logging(settings.log_level, settings.log_format)
        text = open_text(settings.model)
        gateway_settings = settings_of_gateway(settings, text.sampling)
        engine = engine_of(settings, show_progress=not as_json)
        resources.callback(engine.close)

        def on_ready(gateway: Gateway) -> None:
            if as_json:
                print_json({**ready_event(settings, gateway, engine), "workers": workers_of(engine)})
                return
            print_pairs("llama4_dist is serving", start_table(settings, text.summary, engine, gateway))
            if workers := workers_of(engine):
                print_rows("Workers", list(workers[0]), [list(worker.values()) for worker in workers])

        asyncio.run(serve(engine, text.tokenizer, gateway_settings, on_ready=on_ready))


def settings_of_gateway(settings: ServeSettings, sampling: Sampling) -> GatewaySettings:
    """Pick the gateway's part; raises ConfigError for a bind that others could reach without authentication."""
    return GatewaySettings(
        address=settings.address,
        token_file=settings.token_file,
        tls_certificate=settings.tls_certificate,
        tls_key=settings.tls_key,
        tls_client_ca=settings.tls_client_ca,
        reflection=settings.reflection,
        metrics_address=settings.metrics_address,
        max_message_bytes=settings.max_message_bytes,
        max_requests=settings.max_num_seqs + settings.max_waiting,
        max_request_s=settings.max_request_s,
        drain_timeout_s=settings.drain_timeout_s,
        sampling=sampling,
    )


def workers_of(engine: Engine) -> list[dict[str, object]]:
    """Describe the processes of a cluster; none when everything runs in this one."""
    if "cluster.ray_engine" not in sys.modules:
        return []
    from cluster.ray_engine import RayEngine

    if not isinstance(engine, RayEngine):
        return []
    return [
        {
            "worker": status.worker,
            "pid": str(status.pid),
            "node": status.node[:8],
            "state": str(status.state),
            "experts": len(status.experts),  # one of one layer counts as one
            "memory": human_bytes(status.memory_bytes),
        }
        for status in engine.status()
    ]


def ready_event(settings: ServeSettings, gateway: Gateway, engine: Engine) -> dict[str, object]:
    """Say where the gateway listens, for scripts that wait for it."""
    host = settings.address.rpartition(":")[0]
    metrics_host = (settings.metrics_address or "").rpartition(":")[0]
    return {
        "event": "ready",
        "model": engine.limits.model,
        "address": f"{host}:{gateway.port}",
        "metrics_address": f"{metrics_host}:{gateway.metrics_port}" if gateway.metrics_port else None,
    }


def start_table(
    settings: ServeSettings, summary: CheckpointSummary, engine: Engine, gateway: Gateway
) -> dict[str, object]:
    """Everything an operator wants to see once: model, memory, hosts, endpoints."""
    stats, event = engine.stats(), ready_event(settings, gateway, engine)
    hosts = (
        f"{settings.attention} attention, {settings.experts} expert hosts on Ray"
        if settings.experts
        else "none: one process"
    )
    transport = "mTLS" if settings.tls_client_ca else "TLS" if settings.tls_certificate else "plaintext"
    return {
        "model": engine.limits.model,
        **summary_rows(summary),
        "compute": f"{settings.dtype} on {settings.device}",
        "KV blocks": f"{stats.kv_blocks_total:,} of {settings.block_size} tokens",
        "context served": f"{engine.limits.max_context:,} tokens",
        "workers": hosts,
        "gRPC": f"{event['address']} ({transport}, {'bearer token' if settings.token_file else 'no token'})",
        "metrics": f"http://{event['metrics_address']}/metrics"
        if event["metrics_address"]
        else "off (--metrics-address)",
        "try": f"llama4-dist generate --server {event['address']} 'The sea'",
    }
