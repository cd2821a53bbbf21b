"""A client for the commands: of a running gateway, or of one started in this process for a checkpoint folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where a command's work is done: exactly one of `model` and `server`."""

    model: Path | None
    server: str | None
    token: str | None = None
    tls_ca: Path | None = None
    dtype: str = "auto"
    weights: str = "stored"
    device: str = "cpu"
    experts: int = 0
    expert_slices: int = 1
    expert_memory_bytes: int | None = None
    as_json: bool = False


@contextmanager
def open_client(backend: Backend) -> Iterator[Client]:
    """Yield a client; what was started for it is stopped on exit."""
    if (backend.model is None) == (backend.server is None):
        raise ConfigError("give either --model DIR or --server HOST:PORT")
    with ExitStack() as resources:
        if backend.server is not None:
            options = ConnectOptions(token=backend.token, tls_ca=backend.tls_ca)
            yield resources.enter_context(Client(backend.server, options))
            return
        port = resources.enter_context(local_gateway(backend))
        yield resources.enter_context(Client(f"127.0.0.1:{port}", ConnectOptions(token=None)))


@contextmanager
def local_gateway(backend: Backend) -> Iterator[int]:
    """Serve the checkpoint on a loopback port of this process; yield the port.

    The commands so take the same path as any client, and there is no second one to keep alike.
    """
    from anyio.from_thread import start_blocking_portal

    from llama4_dist.cli.local import engine_of, open_text
    from llama4_dist.gateway.run import running_gateway
    from llama4_dist.gateway.settings import GatewaySettings
    from llama4_dist.settings import load_settings

    names = ("model", "dtype", "weights", "device", "experts", "expert_slices", "expert_memory_bytes")
    flags = {name: getattr(backend, name) for name in names}
    settings = load_settings(flags, environ={})
    text = open_text(settings.model)
    with ExitStack() as resources:
        engine = engine_of(settings, show_progress=not backend.as_json)
        resources.callback(engine.close)
        gateway_settings = GatewaySettings(address="127.0.0.1:0", sampling=text.sampling, reflection=False)
        portal = resources.enter_context(start_blocking_portal())
        gateway = running_gateway(engine, text.tokenizer, gateway_settings)
        yield resources.enter_context(portal.wrap_async_context_manager(gateway)).port
