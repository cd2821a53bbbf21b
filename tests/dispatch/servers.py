"""Expert servers in threads behind real sockets, and dispatchers connected to them."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_compute import ExpertCompute
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import Hello
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import Link, LinkLimits, dtype_name
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.dispatch.links.socket import SocketLink
from llama4_dist.dispatch.routing_table import RoutingTable
from tests.dispatch.fakes import NUM_EXPERTS, NUM_LAYERS, WIDTH, ScalingExperts, held_by, identity

SECRET = b"0123456789abcdef0123456789abcdef"
LIMITS = LinkLimits(max_rows=64, handshake_timeout_s=1.0, frame_timeout_s=1.0, max_half_open=8)


def hello(worker: str = "worker-0", *, incarnation: int = 0, dtype: torch.dtype = torch.float32) -> Hello:
    return Hello(
        role="attention",
        id=worker,
        incarnation=incarnation,
        model_hash=identity("any").model_hash,
        width=WIDTH,
        dtype=dtype_name(dtype),
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
    )


class ServerThread:
    """One expert server that runs in a thread until `stop`, with the addresses it listens on."""

    def __init__(
        self,
        host: str,
        compute: ExpertCompute,
        addresses: list[str],
        *,
        dtype: torch.dtype = torch.float32,
        limits: LinkLimits = LIMITS,
        pool_window_s: float = 0.0,
    ) -> None:
        self.compute = compute
        self.dtype = dtype
        self.server = ExpertServer(
            identity=identity(host),
            compute=compute,
            width=WIDTH,
            dtype=dtype,
            limits=limits,
            pool_window_s=pool_window_s,
        )
        self.addresses = []
        for address in addresses:
            listener = Listener(address, secret=SECRET)
            self.addresses.append(listener.address)
            self.server.add_listener(listener)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=host)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run(self._stop)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self.server.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def connect(self, worker: str = "worker-0", *, incarnation: int = 0, address: int = 0) -> SocketLink:
        link = connect(
            self.addresses[address],
            hello=hello(worker, incarnation=incarnation, dtype=self.dtype),
            secret=SECRET,
            limits=self.server.limits,
            timeout_s=5.0,
        )
        assert isinstance(link, SocketLink)
        return link

    def stop(self) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self.server.wake()
        self._thread.join(60)
        assert self._failure is None, f"the server failed: {self._failure!r}"
        assert not self._thread.is_alive(), "the server does not stop"


@contextlib.contextmanager
def serve(
    table: RoutingTable,
    directory: Path,
    *,
    transport: str = "unix",
    dtype: torch.dtype = torch.float32,
    limits: LinkLimits = LIMITS,
) -> Iterator[dict[str, ServerThread]]:
    """Run every host of a table, by host id."""
    servers = {}
    try:
        for host in sorted(table.hosts):
            address = f"unix:{directory}/links/{host}" if transport == "unix" else "tcp:127.0.0.1:0"
            compute = ScalingExperts(held_by(table, host))
            servers[host] = ServerThread(host, compute, [address], dtype=dtype, limits=limits)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def dispatcher(table: RoutingTable, servers: dict[str, ServerThread], worker: str = "worker-0") -> Dispatcher:
    links: dict[str, Link] = {host: server.connect(worker) for host, server in servers.items()}
    dtype = next(iter(servers.values())).dtype
    return Dispatcher(worker=worker, incarnation=0, table=table, links=links, width=WIDTH, dtype=dtype)
