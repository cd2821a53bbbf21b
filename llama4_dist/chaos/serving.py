"""Starts what is to be broken, as a user would: `llama4-dist serve`, and more gateways, in processes of their own."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_dist.errors import UnavailableError

SHUTDOWN_S = 60
COMMAND = (sys.executable, "-c", "from llama4_dist.cli import main; main()")


class Gateway:
    """A gateway in a process of its own, which can be started again at its address."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], resources: ExitStack) -> None:
        self._environment = environment
        self._resources = resources
        self._process, ready = resources.enter_context(started([*command, "--address", "127.0.0.1:0"], environment))
        self.address = str(ready["address"])
        self._command = [*command, "--address", self.address]

    @property
    def pid(self) -> int:
        return self._process.pid

    def restart(self) -> None:
        """Start again, once the process is dead; returns when it serves."""
        self._process.wait(SHUTDOWN_S)
        self._process, _ = self._resources.enter_context(started(self._command, self._environment))


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What serves: gateway addresses as a client takes them, the operator's address, metrics page, process id."""

    addresses: str
    admin_address: str
    metrics_address: str | None
    pid: int
    gateways: tuple[Gateway, ...] = ()


@contextmanager
def serving(
    model: Path, *, num_experts: int, num_attention: int, num_gateways: int = 1, flags: Sequence[str] = ()
) -> Iterator[Serving]:
    """Serve `model`; with more than one gateway each is a process of its own, and the cluster's serves no client."""
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="llama4-chaos-")))
        environment = dict(os.environ)
        apart = num_gateways > 1
        cluster = ["--experts", str(num_experts), "--attention", str(num_attention), "--admin-address", "127.0.0.1:0"]
        common = ["--model", str(model), "--log-level", "warning", "--json"]
        if apart:
            (folder / "secret").write_text(secrets.token_hex(32))
            (folder / "secret").chmod(0o600)
            environment["LLAMA4_DIST_CLUSTER_SECRET_FILE"] = str(folder / "secret")
            cluster += ["--no-gateway", "--directory-address", "127.0.0.1:0"]
        else:
            cluster += ["--metrics-address", "127.0.0.1:0", "--address", "127.0.0.1:0"]
        process, ready = resources.enter_context(started(["serve", *common, *cluster, *flags], environment))
        command = ["gateway", *common, "--directory", str(ready["directory_address"])]
        gateways = tuple(Gateway(command, environment, resources) for _ in range(num_gateways if apart else 0))
        yield Serving(
            addresses=",".join(gateway.address for gateway in gateways) or str(ready["address"]),
            admin_address=str(ready["admin_address"]),
            metrics_address=ready["metrics_address"],
            pid=process.pid,
            gateways=gateways,
        )


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a command that says as JSON when it is ready; UnavailableError with its own words if it does not."""
    arguments = [*COMMAND, *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603 - ours
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            ready = json.loads(line) if line else {}
            if ready.get("event") != "ready":
                said = ready.get("error", {}).get("message", "its own output says why")
                raise UnavailableError(f"{command[0]} did not start: {said}")
            yield process, ready
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                process.kill()
