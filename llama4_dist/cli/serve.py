"""`llama4-dist serve`: settings in, a gateway over an engine out; shows what was started and stops on a signal."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama4_dist.checkpoint.describe import CheckpointSummary
from llama4_dist.cli.inspect import summary_rows
from llama4_dist.cli.local import open_text
from llama4_dist.cli.output import human_bytes, print_json, print_pairs, print_rows, reporting
from llama4_dist.cli.parts import Parts, open_parts
from llama4_dist.engine.port import Engine
from llama4_dist.gateway.engine_ids import engine_id_key
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.observe.engine_collector import EngineCollector
from llama4_dist.gateway.observe.exporter import exporter
from llama4_dist.gateway.run import Gateway, serve
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.partition import WHOLE
from llama4_dist.request import Sampling
from llama4_dist.settings import ServeSettings, load_settings
from llama4_dist.telemetry import tracing
from llama4_dist.telemetry.logs import configure_logging
from llama4_dist.telemetry.tracing import configure_tracing
from llama4_dist.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cluster.admin.settings import AdminSettings

log = logging.getLogger(__name__)

ROLE = "gateway"  # of this process in logs and traces


class Ports(NamedTuple):
    """The ports that this process listens on; None where it does not."""

    gateway: int | None = None
    metrics: int | None = None
    admin: int | None = None


def ports_of(gateway: Gateway, admin_port: int | None) -> Ports:
    """Collect the ports of a process that serves clients."""
    return Ports(gateway=gateway.port, metrics=gateway.metrics_port, admin=admin_port)


def run_serve(flags: Mapping[str, Any], file: Path | None, as_json: bool) -> None:
    """Serve until SIGTERM or SIGINT. With `as_json` one line tells the addresses once everything answers."""
    with reporting(as_json), ExitStack() as resources:
        settings = load_settings(flags, file=file)
        configure_logging(settings.log_level, settings.log_format, of_process=lambda: {"role": ROLE})
        configure_tracing(settings.telemetry, instance=f"{ROLE}-{os.getpid()}", role=ROLE)
        resources.callback(tracing.flush)
        text = open_text(settings.model)
        parts = open_parts(settings, resources, show_progress=not as_json)
        gateway_settings = settings_of_gateway(settings, text.sampling, parts.secret)

        def on_ready(ports: Ports) -> None:
            event = ready_event(settings, ports, parts)
            if as_json:
                print_json({**event, "workers": workers_of(parts.engine)})
                return
            print_pairs("llama4_dist is serving", start_table(settings, text.summary, parts.engine, event))
            if workers := workers_of(parts.engine):
                print_rows("Workers", list(workers[0]), [list(worker.values()) for worker in workers])

        asyncio.run(run_servers(settings, parts, text.tokenizer, gateway_settings, on_ready))


async def run_servers(
    settings: ServeSettings,
    parts: Parts,
    tokenizer: Tokenizer | None,
    gateway_settings: GatewaySettings,
    on_ready: "Callable[[Ports], None]",
) -> None:
    """Serve clients, operators, or both, until told to stop."""
    async with AsyncExitStack() as stack:
        admin_port = None
        if parts.control is not None:
            from cluster.admin.server import running_admin_server

            admin = await stack.enter_async_context(running_admin_server(parts.control, admin_settings(settings)))
            admin_port = admin.port
        if settings.gateway:
            await serve(
                parts.engine,
                tokenizer,
                gateway_settings,
                collectors=parts.collectors,
                on_ready=lambda gateway: on_ready(ports_of(gateway, admin_port)),
            )
            return
        parts.engine.start(lambda outputs: None)  # opens the streams that `stats` and `score` use
        metrics = Metrics([EngineCollector(parts.engine), *parts.collectors])
        metrics_port = stack.enter_context(
            exporter(metrics.registry, settings.metrics_address, token_file=settings.metrics_token_file)
        )
        on_ready(Ports(admin=admin_port, metrics=metrics_port))
        await told_to_stop()


async def told_to_stop() -> None:
    """Wait for SIGTERM or SIGINT."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()


def admin_settings(settings: ServeSettings) -> "AdminSettings":
    """Pick the admin server's part: a port and a credential of its own."""
    from cluster.admin.settings import AdminSettings

    return AdminSettings(
        address=settings.admin_address,
        token_file=settings.admin_token_file,
        tls_certificate=settings.tls_certificate,
        tls_key=settings.tls_key,
        reflection=settings.reflection,
    )


def settings_of_gateway(settings: ServeSettings, sampling: Sampling, secret: bytes | None) -> GatewaySettings:
    """Pick the gateway's part; raises ConfigError for a bind that others could reach without authentication."""
    return GatewaySettings(
        address=settings.address,
        token_file=settings.token_file,
        tls_certificate=settings.tls_certificate,
        tls_key=settings.tls_key,
        tls_client_ca=settings.tls_client_ca,
        reuse_port=settings.reuse_port,
        reflection=settings.reflection,
        metrics_address=settings.metrics_address,
        metrics_token_file=settings.metrics_token_file,
        max_message_bytes=settings.max_message_bytes,
        max_requests=settings.max_num_seqs + settings.max_waiting,
        max_queue_s=settings.max_queue_s,
        max_request_s=settings.max_request_s,
        drain_timeout_s=settings.drain_timeout_s,
        sampling=sampling,
        engine_id_key=engine_id_key(secret) if secret is not None else None,
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


def ready_event(settings: ServeSettings, ports: Ports, parts: Parts) -> dict[str, object]:
    """Say where everything listens, for scripts that wait for it."""

    def at(address: str | None, port: int | None) -> str | None:
        return f"{address.rpartition(':')[0]}:{port}" if address and port else None

    return {
        "event": "ready",
        "model": parts.engine.limits.model,
        "address": at(settings.address, ports.gateway),
        "metrics_address": at(settings.metrics_address, ports.metrics),
        "admin_address": at(settings.admin_address, ports.admin),
        "directory_address": parts.directory or None,
    }


def start_table(
    settings: ServeSettings, summary: CheckpointSummary, engine: Engine, event: Mapping[str, object]
) -> dict[str, object]:
    """Everything an operator wants to see once: model, memory, hosts, endpoints."""
    stats = engine.stats()
    hosts = "none: one process"
    if settings.experts:
        cut = f", every expert in {settings.expert_slices} slices" if settings.expert_slices > 1 else ""
        members = f" of {settings.stages} stages x {settings.tensor} ranks" if settings.partition != WHOLE else ""
        hosts = f"{settings.attention} attention{members}, {settings.experts} expert hosts on Ray{cut}"
    elif settings.directory:
        hosts = f"those of the cluster at {settings.directory}"
    transport = "mTLS" if settings.tls_client_ca else "TLS" if settings.tls_certificate else "plaintext"
    return {
        "model": engine.limits.model,
        **summary_rows(summary),
        "compute": f"{settings.dtype} on {settings.device}, weights {settings.weights}",
        "KV blocks": f"{stats.kv_blocks_total:,} of {settings.block_size} tokens",
        "context served": f"{engine.limits.max_context:,} tokens",
        "workers": hosts,
        "gRPC": f"{event['address']} ({transport}, {'bearer token' if settings.token_file else 'no token'})"
        if event["address"]
        else "none: gateways are other processes",
        "metrics": f"http://{event['metrics_address']}/metrics"
        if event["metrics_address"]
        else "off (--metrics-address)",
        **({"admin": event["admin_address"]} if event["admin_address"] else {}),
        **({"directory": event["directory_address"]} if event["directory_address"] else {}),
        "try": f"llama4-dist generate --server {event['address']} 'The sea'"
        if event["address"]
        else f"llama4-dist gateway --model {settings.model} --directory {event['directory_address']}",
    }
