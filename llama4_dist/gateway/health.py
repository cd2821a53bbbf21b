"""grpc.health.v1 over named conditions: "" and "liveness" (the process answers), "readiness", "startup"."""

import asyncio
from collections.abc import Mapping

from grpc_health.v1 import health_pb2

from llama4_dist.errors import NotFoundError
from llama4_dist.gateway.handlers import Context

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The health service; its conditions are set by whoever knows them."""

    def __init__(self) -> None:
        self._serving = {"": True, "liveness": True, "readiness": False, "startup": False}
        self._changed = asyncio.Event()

    @property
    def conditions(self) -> Mapping[str, bool]:
        return self._serving

    def set(self, name: str, serving: bool) -> None:
        """Set a condition and tell watchers of a change."""
        if self._serving[name] != serving:
            self._serving[name] = serving
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Answer one condition; NOT_FOUND for a name there is not."""
        if request.service not in self._serving:
            raise NotFoundError("no such health service: use liveness, readiness or startup")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Stream a condition; SERVICE_UNKNOWN for a name there is not, as the protocol wants."""
        last = None
        while True:
            status = self._status(request.service)
            changed = self._changed
            if status != last:
                last = status
                await context.write(health_pb2.HealthCheckResponse(status=status))
            await changed.wait()

    def _status(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if name not in self._serving:
            return SERVICE_UNKNOWN
        return SERVING if self._serving[name] else NOT_SERVING
