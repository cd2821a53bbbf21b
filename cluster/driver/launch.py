"""Starts a Ray for this machine, or joins one that runs. Knows no actor and no model.

A Ray started here listens on loopback only, demands a token on every call (Ray's token authentication), shows no
dashboard and lives in a temporary folder of its own; `RaySession.close` ends it. One that was joined is left as it was.
"""

import atexit
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from cluster.driver.socket_folder import socket_folder
from llama4_dist.errors import UnavailableError

log = logging.getLogger(__name__)

NAMESPACE = "llama4_dist"
OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's least; no tensor of ours goes there
PROBE_TIMEOUT_S = 5.0
EXIT_TIMEOUT_S = 10.0
LONGEST_SOCKET = "llama4-ray-12345678/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store"
LOCAL_CPUS = 4096  # a logical count: threads are bounded by each worker's own setting

# Read by Ray's processes when they start.
LOCAL_ENVIRONMENT = {
    "RAY_prestart_worker_first_driver": "0",  # idle workers, one per CPU, cost seconds of start-up and are never used
    "RAY_worker_niceness": "0",  # Ray's 15 starves workers beside any other process: every step waits for the slowest
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "604800",  # else every worker ends a minute after the head died
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySession:
    """A connection to Ray, and whether the cluster behind it is ours to end."""

    started_here: bool
    connected_here: bool
    temp_dir: Path | None = None
    own_token: bool = False

    def close(self) -> None:
        """End what `ensure_ray` began, and nothing else."""
        atexit.unregister(self.close)
        daemons = [] if self.temp_dir is None else processes_of(self.temp_dir)
        if self.connected_here and ray.is_initialized():
            ending = threading.Thread(target=ray.shutdown, daemon=True)  # which waits for a head that is gone
            ending.start()
            ending.join(EXIT_TIMEOUT_S)
        # Ray does not wait for its agents; nothing of the session may outlive it.
        _, alive = psutil.wait_procs(daemons, timeout=EXIT_TIMEOUT_S)
        for process in alive:
            process.kill()
        if self.own_token:
            set_token(None)
        if self.temp_dir is not None:
            shutil.rmtree(self.temp_dir, ignore_errors=True)


def ensure_ray(address: str | None = None) -> RaySession:
    """Join the Ray at `address` ("auto" or host:port), or start one on loopback when it is None.

    A connection that this process already has is used as it is.
    """
    if ray.is_initialized():
        return RaySession(started_here=False, connected_here=False)
    if address is None:
        return start_ray()
    try:
        if address != "auto":  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), PROBE_TIMEOUT_S).close()
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        mute_ray()
    except (OSError, ValueError) as error:
        raise UnavailableError(f"no Ray answers at ray_address={address!r}: start one, or leave it out") from error
    return RaySession(started_here=False, connected_here=True)


def start_ray() -> RaySession:
    """Start a Ray of one node on loopback."""
    temp_dir = Path(tempfile.mkdtemp(prefix="llama4-ray-", dir=socket_folder(LONGEST_SOCKET)))
    # An operator who set the mode has decided about tokens too.
    own_token = "RAY_AUTH_MODE" not in os.environ
    session = RaySession(started_here=True, connected_here=True, temp_dir=temp_dir, own_token=own_token)
    atexit.register(session.close)  # a driver that forgets to close leaves no folder either
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if own_token:
        set_token(secrets.token_hex(32))
    try:
        with loopback_only():
            ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=LOCAL_CPUS,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _temp_dir=str(temp_dir),
            )
        mute_ray()
    except BaseException:
        session.close()
        raise
    return session


def mute_ray() -> None:
    """Keep Ray from printing a paragraph for every worker that dies: we log each in a line."""
    ray_worker.print_to_stdstream = lambda *arguments, **options: None


def processes_of(temp_dir: Path) -> list[psutil.Process]:
    """List the daemons of a Ray that this process started with `temp_dir`, and whatever they started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if any(str(temp_dir) in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def set_token(token: str | None) -> None:
    """Turn Ray's token authentication on with `token`, or leave it to Ray's defaults again.

    Ray reads both variables once per process; the calls make it read them again.
    """
    if token is None:
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ.pop("RAY_AUTH_TOKEN", None)
    else:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def loopback_only() -> Iterator[None]:
    """Make a starting Ray take 127.0.0.1 as its node address, as it does by itself on macOS and Windows.

    It then binds nothing else. On Linux Ray replaces a loopback `_node_ip_address` by the public one, hence the switch.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
