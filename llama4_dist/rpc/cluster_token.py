"""The bearer token of the internal services, derived from the cluster secret, and the interceptor that demands it.

The secret itself never travels: what a peer presents is an HMAC of a fixed label under it (RFC 2104), so a token that
leaks from a log opens this service but proves nothing to the links, whose handshake uses the secret afresh.
"""

from __future__ import annotations  # grpc's classes take type arguments in their stubs only

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import grpc

from llama4_dist.errors import UnauthenticatedError
from llama4_dist.rpc.status import code_of

TOKEN_LABEL = b"llama4_dist internal engine service v1"
MIN_SECRET_BYTES = 16
GATEWAY_KEY = "llama4-gateway"  # metadata: the client's name for itself, new for every client


def cluster_token(secret: bytes) -> str:
    """Derive the token of the internal services."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the cluster secret has {len(secret)} bytes: use at least {MIN_SECRET_BYTES} random ones")
    return hmac.new(secret, TOKEN_LABEL, hashlib.sha256).hexdigest()


def token_metadata(secret: bytes) -> tuple[tuple[str, str], ...]:
    """Return the call metadata that carries the token."""
    return (("authorization", f"Bearer {cluster_token(secret)}"),)


def _refuse(_request: object, context: grpc.ServicerContext) -> Any:
    error = UnauthenticatedError("this service takes the cluster's own token only")
    context.abort(code_of(error), error.message)


class ClusterTokenInterceptor(grpc.ServerInterceptor):
    """Refuse every call without the token, before its body is parsed; no method is exempt."""

    def __init__(self, secret: bytes) -> None:
        self._expected = f"Bearer {cluster_token(secret)}".encode()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Hand the call on, or to a handler that refuses it."""
        presented = [value for key, value in details.invocation_metadata if key == "authorization"]
        if len(presented) == 1 and hmac.compare_digest(str(presented[0]).encode(), self._expected):
            return continuation(details)
        # A stream handler refuses unary calls too: the status is all that either side sees.
        return grpc.stream_stream_rpc_method_handler(_refuse)
