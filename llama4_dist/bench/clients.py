"""Runs a plan against a gateway from this process or from several, when one client cannot keep up."""

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama4_dist.bench.arrivals import shares
from llama4_dist.bench.load import LoadGenerator, OnDone
from llama4_dist.bench.records import PlannedRequest, RequestRecord
from llama4_dist.client.options import ConnectOptions
from llama4_dist.errors import EngineError

START_S = 3.0  # for client processes to start and to connect before the first request is due
PATHS = ("tls_ca", "tls_certificate", "tls_key")


def run_plan(
    address: str,
    options: ConnectOptions,
    requests: Sequence[PlannedRequest],
    *,
    num_clients: int = 1,
    num_connections: int = 1,
    on_done: OnDone = lambda number: None,
) -> list[RequestRecord]:
    """Send all requests from `num_clients` processes (1 is this one) and return a record of each, by scheduled time."""
    if num_clients == 1:
        records = asyncio.run(_run_here(address, options, requests, num_connections, None, on_done))
    else:
        records = _run_apart(address, options, requests, num_clients, num_connections)
        on_done(len(records))
    return sorted(records, key=lambda record: record.scheduled_s)


async def _run_here(
    address: str,
    options: ConnectOptions,
    requests: Sequence[PlannedRequest],
    num_connections: int,
    start_s: float | None,
    on_done: OnDone,
) -> list[RequestRecord]:
    async with LoadGenerator(address, options, num_connections=num_connections) as generator:
        with no_collection():
            return await generator.run(requests, start_s=start_s, on_done=on_done)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep garbage collection out of a run: a pause of the client would be counted as the server's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _run_apart(
    address: str,
    options: ConnectOptions,
    requests: Sequence[PlannedRequest],
    num_clients: int,
    num_connections: int,
) -> list[RequestRecord]:
    start_s = time.monotonic() + START_S  # one clock for all processes of a machine
    command = [sys.executable, "-m", __name__]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        for _ in range(num_clients)
    ]
    try:
        for child, share in zip(children, shares(tuple(requests), num_clients), strict=True):
            assert child.stdin is not None
            order = {
                "address": address,
                "options": {name: str(value) if name in PATHS and value else value for name, value in _fields(options)},
                "num_connections": num_connections,
                "start_s": start_s,
                "requests": [asdict(request) for request in share],
            }
            json.dump(order, child.stdin)
            child.stdin.close()
        answers = [child.stdout.read() if child.stdout is not None else "" for child in children]
        if any(child.wait() for child in children):
            raise EngineError("a client process of the benchmark failed; its own message stands above")
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [record_of(entry) for answer in answers for entry in json.loads(answer)]


def _fields(options: ConnectOptions) -> list[tuple[str, Any]]:
    return list(asdict(options).items())


def record_of(entry: dict[str, Any]) -> RequestRecord:
    """Read a record that another process wrote as JSON."""
    return RequestRecord(**entry | {"tokens": tuple((at_s, number) for at_s, number in entry["tokens"])})


def main() -> None:
    """Be one client process: an order on standard input, records on standard output."""
    order = json.load(sys.stdin)
    options: dict[str, Any] = {
        name: Path(value) if name in PATHS and value else value for name, value in order["options"].items()
    }
    requests = [
        PlannedRequest(**entry | {"prompt_token_ids": tuple(entry["prompt_token_ids"])}) for entry in order["requests"]
    ]
    records = asyncio.run(
        _run_here(
            order["address"],
            ConnectOptions(**options),
            requests,
            order["num_connections"],
            order["start_s"],
            lambda number: None,
        )
    )
    json.dump([asdict(record) for record in records], sys.stdout)


if __name__ == "__main__":
    main()
