"""Replays the bad requests beside canaries and lists what went wrong; never asserts: it runs under `python -O` too."""

import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import Llama4Error
from llama4_dist.request import Sampling
from llama4_dist.rpc import status
from tests.gateway.corpus import HEALTH, REFLECTION, STREAMING, Case, all_cases
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, byte_tokenizer, serving
from tests.waiting import wait_until

PRIVATE = re.compile(
    r"/(work|tmp|home|usr|root|etc)/|0x[0-9a-f]{6,}|Traceback|File \"|\.py\b|\d+\.\d+\.\d+\.\d+|object at"
)
CHANNEL = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]


class Canary:
    """A stream and a unary request that run over and over beside the bad ones and must not notice."""

    def __init__(self, address: str, golden: tuple[int, ...]) -> None:
        self.problems: list[str] = []
        self.num_runs = 0
        self._golden = golden
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and add a problem if it never ran."""
        self._stop.set()
        self._thread.join(timeout=60)
        if self.num_runs < 3:
            self.problems.append(f"the canary ran only {self.num_runs} times")

    def _run(self) -> None:
        sampling = Sampling(max_tokens=len(self._golden), temperature=0, ignore_eos=True)
        with Client(self._address, ConnectOptions(timeout_s=20)) as client:
            while not self._stop.is_set():
                try:
                    streamed = [t for delta in client.stream_generate([7, 8], sampling) for t in delta.token_ids]
                    unary = client.generate([7, 8], sampling).token_ids
                except Llama4Error as error:
                    self.problems.append(f"canary failed: {error!r}")
                    return
                if not (tuple(streamed) == unary == self._golden):
                    self.problems.append(f"canary tokens changed: {streamed} {unary}")
                    return
                self.num_runs += 1


def send(channel: grpc.Channel, case: Case) -> tuple[grpc.StatusCode, str]:
    """Send one case; return its code and everything the client is told."""
    streams = case.method in STREAMING or case.method in (HEALTH + "Watch", REFLECTION)
    open_call: Any = channel.unary_stream if streams else channel.unary_unary
    call = open_call(case.method)
    try:
        arguments = {"timeout": case.timeout_s, "metadata": case.metadata, "compression": case.compression}
        answer = call(case.data, **arguments)
        if streams:
            list(answer)
    except grpc.RpcError as error:
        ours = status.from_rpc_error(error)
        return error.code(), f"{error.details()} {ours} {dict(ours.metadata)}"
    return grpc.StatusCode.OK, ""


def replay(served: Served, golden: tuple[int, ...], num_held: Callable[[], int], cases: Sequence[Case]) -> list[str]:
    """Run the cases; return the problems, none of which may be. `golden` is the canary's answer to [7, 8]."""
    canary = Canary(served.address, golden)
    problems = []
    with grpc.insecure_channel(served.address, CHANNEL) as channel:
        for case in cases:
            began_s = time.monotonic()
            code, told = send(channel, case)
            seconds = time.monotonic() - began_s
            if code not in case.codes:
                problems.append(f"{case.name} {case.method}: {code.name}, {told[:200]}")
            if PRIVATE.search(told):
                problems.append(f"{case.name}: tells {told[:300]}")
            if seconds > 10:
                problems.append(f"{case.name}: took {seconds:.1f} s")
    canary.stop()
    wait_until(
        lambda: num_held() == 0 and served.gateway.admission.in_flight == 0,
        lambda: f"left behind: {num_held()} sequences, {served.gateway.admission.in_flight} calls",
    )
    return problems + canary.problems


def main() -> int:
    """Serve, replay, report; the exit status is 1 if anything was wrong."""
    engine = ScriptedEngine(step_s=0.002)
    with serving(engine, byte_tokenizer()) as served:
        cases = all_cases()
        problems = replay(served, expected_tokens([7, 8], 20), lambda: engine.num_held, cases)
    print(f"{len(cases)} cases", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
