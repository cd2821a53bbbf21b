"""Both ends of connections through a proxy, for the tests of the proxy."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

from tests.faults.proxy import Proxy

PART = bytes(range(250)) * 40


@contextmanager
def pair(proxy: Proxy, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection through the proxy: the client's socket and the server's."""
    family = socket.AF_UNIX if proxy.address.startswith("unix:") else socket.AF_INET
    target = proxy.address[5:] if family == socket.AF_UNIX else ("127.0.0.1", int(proxy.address.rpartition(":")[2]))
    with closing(socket.socket(family)) as client:
        client.settimeout(5.0)
        client.connect(target)
        server, _ = listener.accept()
        server.settimeout(5.0)
        with closing(server):
            yield client, server


def receive(one: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes and (part := one.recv(num_bytes - len(received))):
        received += part
    return received


def send_and_receive(sender: socket.socket, receiver: socket.socket) -> None:
    sender.sendall(PART)
    assert receive(receiver, len(PART)) == PART


def connect_and_receive(client: socket.socket, proxy: Proxy) -> None:
    client.settimeout(5.0)
    client.connect(("127.0.0.1", int(proxy.host_port.rpartition(":")[2])))
    client.recv(1)


@contextmanager
def chatter(one: socket.socket) -> Iterator[None]:
    """Send without end from another thread, as a busy peer does."""
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            try:
                one.sendall(PART)
            except (TimeoutError, ConnectionError):
                return

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        one.shutdown(socket.SHUT_RDWR)
        thread.join(60)
