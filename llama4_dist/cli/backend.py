"""Where the work of a command is done: at a running gateway, or at one started in this process for a checkpoint."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama4_dist.cli.flags import DtypeChoice, ExpertMemory, JsonFlag, TlsCa, Token, WeightsChoice
from llama4_dist.errors import ConfigError

if TYPE_CHECKING:
    from llama4_dist.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder or a gateway: exactly one of `model` and `server`."""

    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder; runs in this process.")] = None
    server: Annotated[str | None, typer.Option("--server", "-s", help="host:port of a running gateway.")] = None
    token: Token = None
    tls_ca: TlsCa = None
    as_json: JsonFlag = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend(Place):
    """And how what is started for a folder computes."""

    dtype: Annotated[DtypeChoice, typer.Option(help="Compute dtype (with --model).")] = DtypeChoice.AUTO
    weights: Annotated[
        WeightsChoice, typer.Option(help="Format of linear weights; int8 changes tokens (with --model).")
    ] = WeightsChoice.STORED
    device: Annotated[str, typer.Option(help="cpu or cuda (with --model).")] = "cpu"
    experts: Annotated[int, typer.Option(help="Expert host processes (with --model); 0 = this process only.")] = 0
    expert_slices: Annotated[int, typer.Option(help="Slices every expert is cut into (with --model).")] = 1
    expert_memory_bytes: ExpertMemory = None


@contextmanager
def open_client(backend: Backend) -> Iterator["Client"]:
    """Yield a client; what was started for it is stopped on exit."""
    from llama4_dist.client import Client, ConnectOptions

    where = chosen(backend)
    if isinstance(where, str):
        with open_remote(backend, where) as client:
            yield client
        return
    with local_gateway(backend) as port, Client(f"127.0.0.1:{port}", ConnectOptions(token=None)) as client:
        yield client


def open_remote(place: Place, server: str) -> "Client":
    """Return a client of a running gateway."""
    from llama4_dist.client import Client, ConnectOptions

    return Client(server, ConnectOptions(token=place.token, tls_ca=place.tls_ca))


def chosen(place: Place) -> Path | str:
    """Return the folder or the gateway's address; ConfigError for neither and for both."""
    if place.model is not None and place.server is None:
        return place.model
    if place.server is not None and place.model is None:
        return place.server
    raise ConfigError("give either --model DIR or --server HOST:PORT")


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
