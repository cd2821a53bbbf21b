"""Measure the gateway itself: an engine without a model behind it, one client process in front of it.

Streams: so many streams get a token every step; how many tokens a second arrive, how long after the engine handed them
out (the two processes share the machine's monotonic clock), what a message costs the server, and what a stream weighs.
Overload: `llama4-dist bench serve` at the engine's peak rate and at multiples of it. Both processes share the machine:
on two cores the client takes one.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from rich.console import Console
from rich.table import Table

from llama4_dist.bench.arrivals import plan, send_times
from llama4_dist.bench.clients import no_collection, run_plan
from llama4_dist.bench.load import METHOD, body
from llama4_dist.bench.records import PlannedRequest
from llama4_dist.bench.statistics import parse_goodput, percentile, summarise
from llama4_dist.client import ConnectOptions
from llama4_dist.v1 import inference_pb2

SHAPES = ((32, 8.0), (64, 8.0), (64, 4.0), (128, 4.0), (256, 64.0), (1000, 250.0))  # streams, step in ms
SLOTS, OUTPUT_LEN, MAX_QUEUE_S = 64, 32, 0.4  # of the engine that is overloaded
OBJECTIVES = "ttft:1000,tpot:50"
Arrived = list[list[tuple[float, bytes]]]


@contextmanager
def serving(*flags: object) -> Iterator[tuple["psutil.Process", int]]:
    """A gateway in a process of its own; yield it and its port, and wait for its end."""
    command = [sys.executable, "-m", "benchmarks.gateway_server", *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            yield psutil.Process(server.pid), port
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


async def read_streams(port: int, number: int, num_tokens: int, server: psutil.Process) -> tuple[Arrived, int]:
    """Read so many streams to their ends; return what arrived when, and the server's memory in their midst."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        open_call: Any = channel.unary_stream(METHOD, response_deserializer=None)
        request = body(PlannedRequest(at_s=0.0, prompt_token_ids=(1, 2, 3), output_len=num_tokens))

        async def read() -> list[tuple[float, bytes]]:
            call, arrived = open_call(request), []
            while (message := await call.read()) is not grpc.aio.EOF:
                arrived.append((time.monotonic(), message))
            return arrived

        reading = [asyncio.create_task(read()) for _ in range(number)]
        while sum(task.done() for task in reading) == 0:
            num_bytes = server.memory_info().rss
            await asyncio.sleep(0.25)
        return list(await asyncio.gather(*reading)), num_bytes


def measure_streams(number: int, step_ms: float, seconds: float, folder: Path) -> dict[str, object]:
    """Run one shape."""
    times_file = folder / "times.json"
    with serving("--step-ms", step_ms, "--running", number, "--times", times_file) as (server, port), no_collection():
        before_bytes, before_cpu = server.memory_info().rss, server.cpu_times()
        began_s = time.monotonic()
        arrived, in_midst_bytes = asyncio.run(read_streams(port, number, round(seconds * 1000 / step_ms), server))
        wall_s, cpu = time.monotonic() - began_s, server.cpu_times()
    handed_out_s = json.loads(times_file.read_text())
    added_ms, num_messages = [], 0
    for stream in arrived:
        for at_s, message in stream:
            num_messages += 1
            steps = inference_pb2.StreamGenerateResponse.FromString(message).delta.token_ids
            added_ms += [1e3 * (at_s - handed_out_s[step]) for step in steps]
    cpu_s = cpu.user + cpu.system - before_cpu.user - before_cpu.system
    return {
        "streams": number,
        "step_ms": step_ms,
        "asked_tokens_per_s": number * 1000 / step_ms,
        "tokens_per_s": len(added_ms) / wall_s,
        "messages_per_s": num_messages / wall_s,
        "added_p50_ms": percentile(added_ms, 50),
        "added_p99_ms": percentile(added_ms, 99),
        "added_max_ms": max(added_ms),
        "server_us_per_message": 1e6 * cpu_s / num_messages,
        "server_us_per_token": 1e6 * cpu_s / len(added_ms),
        "kb_per_stream": (in_midst_bytes - before_bytes) / 1024 / number,
    }


def measure_overload(step_ms: float, multiples: list[float], seconds: float) -> list[dict[str, object]]:
    """Send at multiples of the rate that the engine's slots allow; the first half of each run is warm-up."""
    peak = SLOTS / (OUTPUT_LEN * step_ms / 1000)
    results = []
    flags = ("--step-ms", step_ms, "--running", SLOTS, "--max-queue-s", MAX_QUEUE_S)
    with serving(*flags) as (_, port):
        for multiple in multiples:
            times_s = send_times(multiple * peak, round(multiple * peak * seconds), seed=0)
            requests = plan(times_s, input_len=16, output_len=OUTPUT_LEN, vocab_size=1000, seed=0)
            records = run_plan(f"127.0.0.1:{port}", ConnectOptions(max_attempts=1), requests)
            found = summarise(records, parse_goodput(OBJECTIVES), skip_s=seconds / 2, until_s=times_s[-1])
            results.append({"multiple": multiple, "peak_rate": peak, **found})
    return results


def show(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*("–" if row[name] is None else f"{row[name]:,.1f}" for name in columns))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape; twice that of each rate")
    parser.add_argument("--only", choices=("streams", "overload"))
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the engine that is overloaded")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {}
    if arguments.only != "overload":
        with tempfile.TemporaryDirectory() as folder:
            rows = [measure_streams(*shape, arguments.seconds, Path(folder)) for shape in SHAPES]
        figures["streams"] = rows
        show("streams through one gateway process", rows, list(rows[0]))
    if arguments.only != "streams":
        rows = measure_overload(arguments.step_ms, [0.95, 2.0, 5.0], 2 * arguments.seconds)
        figures["overload"] = rows
        columns = ["multiple", "peak_rate", "request_throughput", "goodput", "p99_ttft_ms", "median_refusal_ms"]
        show(f"overload, objectives {OBJECTIVES} ms", rows, [*columns, "p99_refusal_ms", "p99_send_lag_ms"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
