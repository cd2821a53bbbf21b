"""Runs an admin server in a thread with its own event loop, as a service does beside its engine."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cluster.admin.server import AdminServer, running_admin_server
from cluster.admin.settings import AdminSettings
from cluster.control import ControlPlane
from llama4_dist.errors import Llama4Error

FAST = AdminSettings(watch_interval_s=0.02)


@dataclass(frozen=True, kw_only=True)
class Served:
    """An admin server in its thread."""

    address: str
    server: AdminServer
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=30)


@contextmanager
def admin_serving(control: ControlPlane, settings: AdminSettings = FAST) -> Iterator[Served]:
    """Serve while inside, on a free loopback port."""
    settings = replace(settings, address="127.0.0.1:0")
    started: list[Served | Llama4Error] = []
    ready = threading.Event()
    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        stop = asyncio.Event()
        try:
            async with running_admin_server(control, settings) as server:
                loop = asyncio.get_running_loop()
                stops.append((loop, stop))
                started.append(Served(address=f"127.0.0.1:{server.port}", server=server, loop=loop))
                ready.set()
                await stop.wait()
        except Llama4Error as error:
            started.append(error)  # raised again in the caller's thread
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="admin-server", daemon=True)
    thread.start()
    if not ready.wait(timeout=20):
        raise TimeoutError("the admin server did not start")
    served = started[0]
    if isinstance(served, Llama4Error):
        raise served
    try:
        yield served
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=20)
        if thread.is_alive():
            raise TimeoutError("the admin server did not stop")
