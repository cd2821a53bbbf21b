"""Serves Prometheus text over HTTP, to holders of a token where others can reach it; knows no metric.

Loopback needs no token. A request that is not finished in time is dropped, so that idle connections hold no thread.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from llama4_dist.errors import ConfigError
from llama4_dist.gateway.auth import Tokens
from llama4_dist.settings import host_and_port

REQUEST_TIMEOUT_S = 10.0
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Handler(WSGIRequestHandler):
    """One connection; says nothing on stderr."""

    timeout = REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: a scrape every few seconds is no event."""


class ServerV6(ThreadingWSGIServer):
    """The server on an IPv6 address."""

    address_family = socket.AF_INET6


@contextmanager
def exporter(registry: CollectorRegistry, address: str | None, tokens: Tokens | None = None) -> Iterator[int | None]:
    """Serve the registry while inside; yield the port, or None where there is no address."""
    if address is None:
        yield None
        return
    host, port = host_and_port(address)
    pages = make_wsgi_app(registry)
    app = pages if tokens is None else demand_token(pages, tokens)
    try:
        server = make_server(host, port, app, ServerV6 if ":" in host else ThreadingWSGIServer, Handler)
    except OSError as error:
        raise ConfigError(f"metrics_address {address}: {error.strerror}") from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def demand_token(app: App, tokens: Tokens) -> App:
    """Answer 401 to whoever shows no token of the file."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        scheme, _, token = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        if scheme.lower() == "bearer" and tokens.scope_of(token.strip()) is not None:
            return app(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
        return [b""]

    return guarded
