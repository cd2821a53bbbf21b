"""Runs an admin server in a thread with its own event loop, as a service does beside its engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cluster.admin.server import AdminServer, running_admin_server
from cluster.admin.settings import AdminSettings
from cluster.control import ControlPlane
from llama4_dist.client.options import ConnectOptions
from tests.loop_thread import OnLoop, in_loop_thread

FAST = AdminSettings(watch_interval_s=0.02)
ONCE = ConnectOptions(max_attempts=1, timeout_s=20)


@dataclass(frozen=True, kw_only=True)
class Served(OnLoop):
    """An admin server in its thread."""

    address: str
    server: AdminServer


@contextmanager
def admin_serving(control: ControlPlane, settings: AdminSettings = FAST) -> Iterator[Served]:
    """Serve while inside, on a free loopback port."""
    settings = replace(settings, address="127.0.0.1:0")
    with in_loop_thread(running_admin_server(control, settings), "admin server") as (server, loop):
        yield Served(address=f"127.0.0.1:{server.port}", server=server, loop=loop)
