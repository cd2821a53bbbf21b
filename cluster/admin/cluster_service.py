"""llama4_dist.v1.ClusterService over a control plane: checks requests, waits off the loop; decides no change itself."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from google.longrunning import operations_pb2

from cluster.admin.calls import AdminCalls
from cluster.admin.cluster_wire import (
    cluster_to_proto,
    operation_to_proto,
    options_from_proto,
    to_timestamp,
    worker_to_proto,
)
from cluster.admin.paging import invalid, page, seconds
from cluster.admin.revised import Revised
from cluster.control import ControlPlane
from cluster.operation import ClusterView, Operation
from llama4_dist.gateway.handlers import Context
from llama4_dist.v1 import cluster_pb2

DEFAULT_WORKERS, MAX_WORKERS = 100, 1000
MAX_HOSTS = 65_536  # beyond this a number is a slip; what fits is the control plane's to say
HEARTBEAT_S, MIN_HEARTBEAT_S, MAX_HEARTBEAT_S = 10.0, 0.1, 600.0


def looks_alike(one: ClusterView, other: ClusterView) -> bool:
    """Compare all but memory sizes, which move all the time."""
    return without_memory(one) == without_memory(other)


def without_memory(view: ClusterView) -> ClusterView:
    """Return the view with every memory size at 0."""
    return replace(view, workers=tuple(replace(worker, memory_bytes=0) for worker in view.workers))


class ClusterService:
    """Methods named as in cluster.proto."""

    def __init__(self, control: ControlPlane, calls: AdminCalls, *, watch_interval_s: float) -> None:
        self._control = control
        self._calls = calls
        self._interval_s = watch_interval_s
        self._views = Revised(lambda: calls.ask(control.view), looks_alike, max_age_s=watch_interval_s)

    async def GetCluster(self, request: cluster_pb2.GetClusterRequest, context: Context) -> cluster_pb2.Cluster:
        """Describe the cluster as it is now."""
        return cluster_to_proto(await self._calls.ask(self._control.view))

    async def ListWorkers(
        self, request: cluster_pb2.ListWorkersRequest, context: Context
    ) -> cluster_pb2.ListWorkersResponse:
        """List a page of processes with their experts."""
        view = await self._calls.ask(self._control.view)
        workers = [worker_to_proto(worker, num_slices=view.num_slices, with_experts=True) for worker in view.workers]
        if request.role:
            workers = [worker for worker in workers if worker.role == request.role]
        found, next_token = page(
            workers,
            lambda worker: worker.worker,
            size=request.page_size,
            token=request.page_token,
            default=DEFAULT_WORKERS,
            most=MAX_WORKERS,
        )
        return cluster_pb2.ListWorkersResponse(workers=found, next_page_token=next_token)

    async def WatchCluster(self, request: cluster_pb2.WatchClusterRequest, context: Context) -> None:
        """Send the cluster when it changed, and a heartbeat when it did not for long."""
        given = request.heartbeat if request.HasField("heartbeat") else None
        heartbeat_s = seconds("heartbeat", given, default=HEARTBEAT_S, least=MIN_HEARTBEAT_S, most=MAX_HEARTBEAT_S)
        loop = asyncio.get_running_loop()
        sent, sent_s = 0, loop.time()
        while True:
            revision, view = await self._views.latest()
            event = cluster_pb2.WatchClusterResponse(revision=revision)
            if revision != sent:
                event.cluster.CopyFrom(cluster_to_proto(view))
            elif loop.time() - sent_s >= heartbeat_s:
                event.heartbeat.time.CopyFrom(to_timestamp(time.time()))
            if event.WhichOneof("event"):
                await context.write(event)
                sent, sent_s = revision, loop.time()
            await self._calls.pause(min(self._interval_s, heartbeat_s))

    async def ScaleExpertPool(
        self, request: cluster_pb2.ScaleExpertPoolRequest, context: Context
    ) -> operations_pb2.Operation:
        """Begin to scale."""
        if not request.HasField("target_hosts"):
            raise invalid("target_hosts", "is missing: give the number of expert hosts wanted")
        if not 1 <= request.target_hosts <= MAX_HOSTS:
            raise invalid("target_hosts", f"must be 1 to {MAX_HOSTS}, not {request.target_hosts}")
        return await self._begin(request, self._control.scale, request.target_hosts)

    async def RebalanceExperts(
        self, request: cluster_pb2.RebalanceExpertsRequest, context: Context
    ) -> operations_pb2.Operation:
        """Begin to rebalance."""
        return await self._begin(request, self._control.rebalance)

    async def DrainWorker(self, request: cluster_pb2.DrainWorkerRequest, context: Context) -> operations_pb2.Operation:
        """Begin to empty a host."""
        if not request.worker:
            raise invalid("worker", "is missing: name an expert host, as ListWorkers does")
        return await self._begin(request, self._control.drain, request.worker)

    async def _begin(self, request: Any, change: Callable[..., Operation], *arguments: Any) -> operations_pb2.Operation:
        options = options_from_proto(request)
        operation = await self._calls.ask(change, *arguments, options=options)
        return operation_to_proto(operation, validate_only=options.validate_only)
