"""The round trip of rows to an expert host in another process and back, and a bare socket echo of the same bytes.

The host only copies its rows, so what is measured is dispatch, wire and combine. Both run in turns, so that what else
the machine does falls on both, and the other process on another core, as a host elsewhere would: where the scheduler
put both on one, an echo would be two context switches and no wake-up. `benchmarks/dispatch.py` of the repository takes
the same round trip apart.
"""

import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llama4_dist.bench.statistics import percentile
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import Hello, HostIdentity
from llama4_dist.dispatch.links.address import bind, parse_address
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import Link, LinkLimits
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.dispatch.routing_table import Replica, RoutingTable
from llama4_dist.errors import EngineError

NUM_EXPERTS = 16
TURN = 20  # calls of one kind before the other's turn
LIMITS = LinkLimits()
TIMEOUT_S = 10.0


class CopyExperts:
    """Experts that answer with their input."""

    holds = frozenset((0, expert) for expert in range(NUM_EXPERTS))

    def adopt(self, pairs: object) -> None:
        """Hold everything already."""

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        out_RD.copy_(x_RD)


def expert_server(width: int) -> ExpertServer:
    """Return the host of all experts, which nobody is connected to yet."""
    identity = HostIdentity(host="host", incarnation=0, model_hash="bench", num_layers=1, num_experts=NUM_EXPERTS)
    return ExpertServer(identity=identity, compute=CopyExperts(), width=width, dtype=torch.float32, limits=LIMITS)


def measure_dispatch(
    rows: Sequence[int], *, width: int, rounds: int, tcp: bool, on_done: Callable[[int], None] = lambda number: None
) -> list[dict[str, object]]:
    """Return, for each number of rows, the round trip through dispatch and the bare echo, in microseconds."""
    with tempfile.TemporaryDirectory(prefix="llama4-bench-") as folder:
        host_name, echo_name = ("tcp:127.0.0.1:0" if tcp else f"unix:{folder}/{name}.sock" for name in ("host", "echo"))
        cores = sorted(os.sched_getaffinity(0))
        with on_core(0), peer(width, host_name, echo_name, cores) as (host, echo, secret):
            dispatcher, bare = connect_dispatcher(host, secret, width), connect_bare(echo)
            try:
                results = []
                for done, number in enumerate(rows):
                    results.append(compare(dispatcher, bare, number, width, rounds))
                    on_done(done + 1)
                return results
            finally:
                dispatcher.close()
                bare.close()


def compare(dispatcher: Dispatcher, bare: socket.socket, num_rows: int, width: int, rounds: int) -> dict[str, object]:
    """Time both in turns on rows of float32; the first turn of each only warms up."""
    x_TD, scores_TK = torch.randn(num_rows, width), torch.rand(num_rows, 1)
    experts_TK = torch.randint(0, NUM_EXPERTS, (num_rows, 1))
    outgoing, incoming = bytes(x_TD.nbytes), memoryview(bytearray(x_TD.nbytes))

    def echo() -> None:
        bare.sendall(outgoing)
        receive(bare, incoming)

    def round_trip() -> Tensor:
        return dispatcher.combine(dispatcher.dispatch(0, x_TD, experts_TK, scores_TK))

    if not torch.equal(round_trip(), x_TD * scores_TK):
        raise EngineError("the rows that came back are not those that were sent")
    taken_us: dict[str, list[float]] = {"dispatch": [], "echo": []}
    for turn in range(rounds + 1):
        bare.sendall(len(outgoing).to_bytes(8, "little"))
        new = {"echo": timed_us(echo), "dispatch": timed_us(round_trip)}
        if turn:
            for name, values in new.items():
                taken_us[name] += values
    found: dict[str, object] = {"rows": num_rows, "kilobytes": len(outgoing) / 1024}
    for name, values in taken_us.items():
        found |= {f"{name}_p{percent}_us": percentile(values, percent) for percent in (10, 50, 99)}
    return found | {"ratio_p50": percentile(taken_us["dispatch"], 50) / percentile(taken_us["echo"], 50)}


def timed_us(call: Callable[[], object]) -> list[float]:
    """Time each of a turn's calls."""
    taken = []
    for _ in range(TURN):
        began_s = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - began_s))
    return taken


def connect_dispatcher(address: str, secret: bytes, width: int) -> Dispatcher:
    """Dial the host, which holds every expert."""
    hello = Hello(
        role="attention",
        id="worker",
        incarnation=0,
        model_hash="bench",
        width=width,
        dtype="float32",
        num_layers=1,
        num_experts=NUM_EXPERTS,
    )
    return dispatcher_over(connect(address, hello=hello, secret=secret, limits=LIMITS, timeout_s=TIMEOUT_S), width)


def dispatcher_over(link: Link, width: int) -> Dispatcher:
    """Return a dispatcher that sends every row over this link."""
    replica = Replica("host", 0)
    table = RoutingTable(epoch=0, replicas={(0, expert): (replica,) for expert in range(NUM_EXPERTS)})
    return Dispatcher(
        worker="worker", incarnation=0, table=table, links={"host": link}, width=width, dtype=torch.float32
    )


def connect_bare(address: str) -> socket.socket:
    """Dial the echo."""
    family, target = parse_address(address)
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT_S)
    connection.connect(target)
    if family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep this thread to one of the cores it may use; on a machine with one core both processes share it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[number % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def peer(width: int, host: str, echo: str, cores: Sequence[int]) -> Iterator[tuple[str, str, bytes]]:
    """Start the process at the other end; yield the addresses of its host and its echo, and the host's secret."""
    secret = secrets.token_bytes(32)
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            order = {"width": width, "host": host, "echo": echo, "secret": secret.hex(), "cores": cores}
            json.dump(order, process.stdin)
            process.stdin.close()
            answer = process.stdout.readline()
            if not answer:
                raise EngineError("the process at the other end did not start; its own message stands above")
            addresses = json.loads(answer)
            yield addresses["host"], addresses["echo"], secret
        finally:
            process.kill()


def receive(connection: socket.socket, target: memoryview) -> None:
    """Fill `target`; raise EOFError if the other end closes before."""
    received = 0
    while received < len(target):
        count = connection.recv_into(target[received:])
        if count == 0:
            raise EOFError
        received += count


def serve_echo(listener: socket.socket) -> None:
    """Send back what comes, in turns of one size, which is announced first."""
    connection, _ = listener.accept()
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while header := connection.recv(8):
        buffer = memoryview(bytearray(int.from_bytes(header, "little")))
        for _ in range(TURN):
            receive(connection, buffer)
            connection.sendall(buffer)


def address_of(listener: socket.socket) -> str:
    """Return the address that a listener got."""
    name = listener.getsockname()
    return f"unix:{name}" if isinstance(name, str) else f"tcp:{name[0]}:{name[1]}"


def main() -> None:
    """Be the process at the other end: an order on standard input, addresses on standard output."""
    order = json.load(sys.stdin)
    logging.getLogger("llama4_dist").setLevel(logging.ERROR)  # that the link ends at the end is no news
    os.sched_setaffinity(0, {order["cores"][1 % len(order["cores"])]})
    torch.set_num_threads(1)
    server = expert_server(order["width"])
    listener = Listener(order["host"], secret=bytes.fromhex(order["secret"]))
    server.add_listener(listener)
    echo = bind(order["echo"], 1)
    echo.setblocking(True)
    threading.Thread(target=serve_echo, args=(echo,), daemon=True).start()
    sys.stdout.write(json.dumps({"host": listener.address, "echo": address_of(echo)}) + "\n")
    sys.stdout.flush()
    server.run(threading.Event())


if __name__ == "__main__":
    main()
