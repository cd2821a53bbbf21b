"""A proxy before a listener; every test of the proxy begins there."""

import socket
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxy


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        one.settimeout(5.0)
        yield one


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    with Proxy(f"tcp:127.0.0.1:{listener.getsockname()[1]}", seed=7) as one:
        yield one
