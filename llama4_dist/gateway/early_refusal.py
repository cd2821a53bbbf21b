"""Refuses generations that cannot be admitted before their body is read: in an overload most calls end here."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from llama4_dist.errors import Llama4Error
from llama4_dist.gateway.admission import Admission
from llama4_dist.gateway.handlers import Context, Handler, refuse
from llama4_dist.gateway.metrics import Metrics

SERVICE = "/llama4_dist.v1.InferenceService/"
GENERATIONS = frozenset(SERVICE + name for name in ("Generate", "StreamGenerate", "Chat", "StreamChat"))


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Stands behind the one that asks for credentials: a stranger learns nothing of the load."""

    def __init__(self, admission: Admission, metrics: Metrics) -> None:
        self._admission = admission
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Let the call pass, or answer it here."""
        if handler_call_details.method in GENERATIONS:
            try:
                self._admission.check()
            except Llama4Error as error:
                return self._refusal(error, handler_call_details.method)
        return await continuation(handler_call_details)

    def _refusal(self, error: Llama4Error, method: str) -> Handler:
        async def answer(requests: Any, context: Context) -> None:
            await refuse(error, context, self._metrics, method.removeprefix("/llama4_dist.v1."))

        # A handler of streams is called without waiting for a message; the caller's kind of call does not matter.
        return grpc.stream_stream_rpc_method_handler(answer)
