"""Serves a registry as Prometheus text over HTTP; knows no metric. Beyond loopback it asks for a bearer token."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, AF_INET6
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from llama4_dist.errors import ConfigError
from llama4_dist.gateway.auth import Tokens, read_tokens
from llama4_dist.settings import host_and_port

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

MAX_CONNECTIONS = 32  # each holds a thread
TIMEOUT_S = 10.0  # for a peer that says nothing


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Keep scrapes out of the log."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = False  # two processes on one port would answer in turn
    allow_reuse_port = False

    def __init__(self, address: tuple[str, int]) -> None:
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        self._room = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave a scraper that went away to itself."""


@contextmanager
def exporter(
    registry: CollectorRegistry, address: str | None, *, token_file: Path | None = None
) -> Iterator[int | None]:
    """Serve while inside; yield the port. With a token file any of its tokens passes, and nobody without one."""
    if address is None:
        yield None
        return
    tokens = read_tokens(token_file) if token_file is not None else None
    try:
        server = _Server(host_and_port(address))
    except OSError as error:
        raise ConfigError(f"metrics_address {address}: {error.strerror}") from None
    server.set_app(guarded(make_wsgi_app(registry), tokens))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def guarded(app: "Callable[..., Any]", tokens: Tokens | None) -> "WSGIApplication":
    """Put a bearer token before an application; None lets everybody pass."""

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if tokens is not None and (scheme.lower() != "bearer" or tokens.scope_of(token) is None):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
            return [b""]
        found: Iterable[bytes] = app(environ, start_response)
        return found

    return answer
