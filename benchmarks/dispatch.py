"""Measure the dispatch round trip against a bare socket echo and gloo, of the same bytes, interleaved in one run.

The expert host runs in another process and only copies its rows, so what is measured is dispatch, wire and combine.
The bare echo is `sendall` and a `recv_into` loop on both sides, also between two processes, over the same transport.
Both peers run on another core than the caller, as a host elsewhere would: left to itself, the scheduler may put caller
and echo on one core, where a round trip is two context switches and no wake-up. gloo is `torch.distributed.send` and
`recv` of a tensor between two processes, over TCP on loopback; its own threads may run on either core.
"""

import argparse
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llama4_dist.bench.dispatch import (
    NUM_EXPERTS,
    TURN,
    address_of,
    connect_bare,
    connect_dispatcher,
    dispatcher_over,
    expert_server,
    receive,
    serve_echo,
)
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.links.address import bind
from llama4_dist.dispatch.links.listener import Listener

WIDTH = 1024
ROWS = {"4 KB": 1, "64 KB": 16, "1 MB": 256}


def run_expert_host(address: str, secret: bytes, ready: Connection) -> None:
    torch.set_num_threads(1)
    pin(1)
    server = expert_server(WIDTH)
    listener = Listener(address, secret=secret)
    server.add_listener(listener)
    ready.send(listener.address)
    server.run(threading.Event())


def run_echo(address: str, ready: Connection) -> None:
    pin(1)
    listener = bind(address, 1)
    listener.setblocking(True)
    ready.send(address_of(listener))
    serve_echo(listener)


def join_gloo(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def run_gloo(store: str, rounds: int) -> None:
    torch.set_num_threads(1)
    join_gloo(1, store)
    pin(1)
    for num_rows in ROWS.values():
        rows_RD = torch.empty(num_rows, WIDTH)
        for _ in range((rounds + 1) * TURN):
            torch.distributed.recv(rows_RD, 0)
            torch.distributed.send(rows_RD, 0)


def pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def timed(call: Callable[[], object]) -> list[float]:
    seconds = []
    for _ in range(TURN):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(echo: socket.socket, remote: Dispatcher, local: Dispatcher, rounds: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for label, num_rows in ROWS.items():
        x_TD = torch.randn(num_rows, WIDTH)
        experts_TK = torch.randint(0, NUM_EXPERTS, (num_rows, 1))
        scores_TK = torch.rand(num_rows, 1)
        expected_TD = x_TD * scores_TK
        outgoing = bytes(x_TD.nbytes)
        incoming = memoryview(bytearray(len(outgoing)))

        def bare(outgoing: bytes = outgoing, incoming: memoryview = incoming) -> None:
            echo.sendall(outgoing)
            receive(echo, incoming)

        def gloo(x_TD: Tensor = x_TD, y_TD: Tensor = torch.empty_like(x_TD)) -> None:  # noqa: B008
            torch.distributed.send(x_TD, 1)
            torch.distributed.recv(y_TD, 1)

        def ours(
            dispatcher: Dispatcher, batch: tuple[Tensor, Tensor, Tensor] = (x_TD, experts_TK, scores_TK)
        ) -> Tensor:
            return dispatcher.combine(dispatcher.dispatch(0, *batch))

        samples: dict[str, list[float]] = {"bare": [], "gloo": [], "ours": [], "inproc": []}
        for index in range(rounds + 1):
            echo.sendall(len(outgoing).to_bytes(8, "little"))
            taken = {"bare": timed(bare), "gloo": timed(gloo)}
            taken |= {"ours": timed(lambda: ours(remote)), "inproc": timed(lambda: ours(local))}
            if index:  # the first round warms up
                for kind, seconds in taken.items():
                    samples[kind] += seconds
        assert torch.equal(ours(remote), expected_TD)
        p50 = {kind: statistics.median(seconds) * 1e6 for kind, seconds in samples.items()}
        p10 = {kind: statistics.quantiles(seconds, n=10)[0] * 1e6 for kind, seconds in samples.items()}
        results.append(
            {
                "payload": label,
                "rows": num_rows,
                "bare_echo_p50_us": round(p50["bare"], 1),
                "dispatch_p50_us": round(p50["ours"], 1),
                "ratio": round(p50["ours"] / p50["bare"], 2),
                "p10_ratio": round(p10["ours"] / p10["bare"], 2),
                "gloo_p50_us": round(p50["gloo"], 1),
                "gloo_ratio": round(p50["gloo"] / p50["ours"], 2),
                "inproc_p50_us": round(p50["inproc"], 1),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tcp", action="store_true", help="TCP over loopback instead of Unix sockets")
    parser.add_argument("--rounds", type=int, default=30, help=f"rounds of {TURN} calls of each kind")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    secret = secrets.token_bytes(32)
    context = multiprocessing.get_context("spawn")
    ready, child_end = context.Pipe()
    children = []
    with tempfile.TemporaryDirectory() as directory:
        names = {"echo": "tcp:127.0.0.1:0", "host": "tcp:127.0.0.1:0"}
        if not arguments.tcp:
            names = {name: f"unix:{directory}/{name}.sock" for name in names}
        targets: list[tuple[Callable[..., None], tuple[object, ...]]] = [
            (run_echo, (names["echo"], child_end)),
            (run_expert_host, (names["host"], secret, child_end)),
        ]
        addresses = []
        for target, args in targets:
            child = context.Process(target=target, args=args, daemon=True)
            child.start()
            children.append(child)
            addresses.append(ready.recv())
        store = f"{directory}/gloo"
        children.append(context.Process(target=run_gloo, args=(store, arguments.rounds), daemon=True))
        children[-1].start()
        join_gloo(0, store)
        pin(0)
        server = expert_server(WIDTH)
        local = dispatcher_over(server.open_inproc(worker="worker", incarnation=0), WIDTH)
        remote = connect_dispatcher(addresses[1], secret, WIDTH)
        echo = connect_bare(addresses[0])
        echo.settimeout(None)  # with a timeout each call would look at the descriptor first
        results = measure(echo, remote, local, arguments.rounds)
        for child in children:
            child.terminate()
            child.join()
    transport = "tcp" if arguments.tcp else "unix"
    table = Table(title=f"dispatch round trip over {transport} sockets, µs; p10 is the machine at its least busy")
    for column in results[0]:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(*(str(value) for value in result.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "dispatch", "transport": transport, "results": results}))


if __name__ == "__main__":
    main()
