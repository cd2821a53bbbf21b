"""A gateway over a scripted engine in a process of its own, for tests of signals and of its memory."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llama4_dist.client import Client, ConnectOptions


@contextmanager
def serving_process(step_s: float) -> Iterator[tuple["subprocess.Popen[str]", Client, str]]:
    """A serving process, a client of it, and its address."""
    command = [sys.executable, "-m", "tests.gateway.serve_scripted", str(step_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            port = int(running.stdout.readline())
            address = f"127.0.0.1:{port}"
            with Client(address, ConnectOptions(max_attempts=1)) as client:
                client.wait_ready(10)
                yield running, client, address
        finally:
            running.kill()
