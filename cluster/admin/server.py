"""Serves a control plane on a port of its own, to admins only; owns neither the cluster nor its operations."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from google.longrunning import operations_pb2

from cluster.admin.calls import AdminCalls
from cluster.admin.cluster_service import ClusterService
from cluster.admin.expert_service import ExpertService
from cluster.admin.operations_service import OperationsService
from cluster.admin.settings import AdminSettings
from cluster.control import ControlPlane
from llama4_dist.errors import Llama4Error
from llama4_dist.gateway.health import Health
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.server import Services, build_admin_server
from llama4_dist.v1 import cluster_pb2, experts_pb2

log = logging.getLogger(__name__)

READINESS_INTERVAL_S = 2.0
CANCEL_GRACE_S = 1.0  # for calls to read their last status


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdminServer:
    """An admin server that serves."""

    port: int
    health: Health


@asynccontextmanager
async def running_admin_server(
    control: ControlPlane, settings: AdminSettings, *, metrics: Metrics | None = None
) -> AsyncIterator[AdminServer]:
    """Serve while inside. `metrics` counts the calls beside a gateway's; None counts them for nobody.

    Its methods answer UNAVAILABLE while the control plane is away; it never ends because of that.
    """
    calls = AdminCalls(num_threads=settings.num_threads, timeout_s=settings.call_timeout_s)
    health = Health()
    server, port = build_admin_server(
        settings.transport,
        services_of(control, calls, settings.watch_interval_s),
        health=health,
        metrics=metrics or Metrics(),
    )
    await server.start()
    health.set("startup", True)
    watch = asyncio.create_task(watch_readiness(control, calls, health))
    log.info("admin_serving address=%s port=%d", settings.address, port)
    try:
        yield AdminServer(port=port, health=health)
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        health.set("readiness", False)
        calls.close()
        await server.stop(CANCEL_GRACE_S)


def services_of(control: ControlPlane, calls: AdminCalls, watch_interval_s: float) -> Services:
    """Build the three services."""
    return {
        cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"]: ClusterService(
            control, calls, watch_interval_s=watch_interval_s
        ),
        experts_pb2.DESCRIPTOR.services_by_name["ExpertService"]: ExpertService(
            control, calls, watch_interval_s=watch_interval_s
        ),
        operations_pb2.DESCRIPTOR.services_by_name["Operations"]: OperationsService(control, calls),
    }


async def watch_readiness(control: ControlPlane, calls: AdminCalls, health: Health) -> None:
    """Turn readiness off while the control plane does not answer, and on again."""
    while True:
        try:
            await calls.ask(control.operations)
            ready = True
        except Llama4Error as error:
            log.warning("control_plane_away reason=%s", error.reason)
            ready = False
        except Exception:  # the watch must outlive a defect, or readiness would freeze
            log.exception("control_plane_away")
            ready = False
        health.set("readiness", ready)
        await calls.pause(READINESS_INTERVAL_S)
