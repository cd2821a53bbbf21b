"""Runs a narrow Behemoth over Ray in stages, ranks and slices, kills a host and a member, and compares every token.

The geometry is synthetic: Behemoth's was never published beyond 16 experts, 288B active parameters and about 2T in all.
It has as many layers and experts as the project's own Behemoth and is 64 wide, so it shows that the parts fit together
and nothing about speed. Tokens must be those of one process whose members are threads, and are compared with those of
a model that is not cut, too. Exit code 1 when a request was lost or a token differs from the same cut's.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.ray_engine import RayEngine
from cluster.worker import State
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.partition import WHOLE, Partition
from llama4_dist.request import EngineRequest
from tests.checkpoints import make_checkpoint
from tests.cluster.running import Collector, Tokens, some_requests

GROUP = "attention-0"
VICTIMS = ("expert-3", f"{GROUP}-stage-1-rank-0")
OPTIONS = EngineOptions(num_blocks=400, max_num_seqs=8)
WHOLE_TIMEOUT_S = 180.0


def reference(model_dir: Path, requests: Sequence[EngineRequest], partition: Partition, slices: int) -> Tokens:
    """Return what one process says."""
    engine = build_single_process(model_dir, partition=partition, expert_slices=slices, options=OPTIONS, num_threads=1)
    collector = Collector()
    engine.start(collector.collect)
    try:
        return collector.run(engine, requests)
    finally:
        engine.close()


def is_whole(engine: RayEngine, victim: str, pid: int) -> bool:
    """Tell whether a victim was replaced, and all of the group are in one formation."""
    workers = {one.worker: one for one in engine.status()}
    formations = {one.formation for one in workers.values() if one.group}
    now = workers.get(victim)
    is_new = now is not None and now.state is State.READY and now.pid not in (0, pid)
    return is_new and len(formations) == 1 and formations != {0}


def strike(engine: RayEngine, collector: Collector, victim: str, max_tokens: int) -> tuple[list[EngineRequest], float]:
    """Kill a process while requests run; return them and the seconds until all is whole again."""
    requests = some_requests(f"{victim}/", max_tokens=max_tokens)
    for request in requests:
        engine.submit(request)
    collector.wait_for_tokens(requests[0].request_id, 2)
    pid = next(one.pid for one in engine.status() if one.worker == victim)
    os.kill(pid, signal.SIGKILL)
    begun_s = time.monotonic()
    collector.wait_for([request.request_id for request in requests])
    while not is_whole(engine, victim, pid):
        if time.monotonic() - begun_s > WHOLE_TIMEOUT_S:
            raise TimeoutError(f"{victim} was not replaced in {WHOLE_TIMEOUT_S} s")
        time.sleep(0.2)
    return requests, time.monotonic() - begun_s


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything and return what was seen."""
    partition = Partition(num_stages=arguments.stages, num_ranks=arguments.tensor)
    model_dir = make_checkpoint(folder / "model", "behemoth", num_hidden_layers=arguments.layers)
    begun_s = time.monotonic()
    engine = RayEngine(
        model_dir,
        num_expert_hosts=arguments.hosts,
        num_replicas=2,
        expert_slices=arguments.slices,
        partition=partition,
        options=OPTIONS,
        num_threads=1,
        start_timeout_s=600.0,
        replay_timeout_s=WHOLE_TIMEOUT_S,
    )
    seen: dict[str, Any] = {"started_s": round(time.monotonic() - begun_s, 1), "blows": []}
    asked: list[EngineRequest] = some_requests("before/", max_tokens=arguments.max_tokens)
    try:
        collector = Collector()
        engine.start(collector.collect)
        begun_s = time.monotonic()
        collector.run(engine, asked)
        seen["first_requests_s"] = round(time.monotonic() - begun_s, 1)
        for victim in VICTIMS:
            requests, whole_after_s = strike(engine, collector, victim, arguments.max_tokens)
            asked += requests
            seen["blows"].append({"victim": victim, "whole_after_s": round(whole_after_s, 1)})
        after = some_requests("after/", max_tokens=arguments.max_tokens)
        collector.run(engine, after)
        asked += after
        workers = engine.status()
        seen["processes"] = len(workers)
        seen["resident_bytes"] = sum(one.memory_bytes for one in workers)
        seen["formation"] = next(one.formation for one in workers if one.worker == GROUP)
    finally:
        engine.close()
    said = {name: tuple(tokens) for name, tokens in collector.tokens.items()}
    same_cut, uncut = (reference(model_dir, asked, cut, arguments.slices) for cut in (partition, WHOLE))
    seen["requests"] = len(asked)
    seen["tokens"] = sum(map(len, same_cut.values()))
    seen["lost"] = sum(collector.last[name].error is not None for name in same_cut)
    seen["equal_to_same_cut"] = sum(said[name] == tokens for name, tokens in same_cut.items())
    seen["equal_to_uncut"] = sum(said[name] == tokens for name, tokens in uncut.items())
    return seen


def main() -> None:
    """Parse flags, run, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"stages": 4, "tensor": 2, "hosts": 16, "slices": 2, "layers": 96, "max_tokens": 12}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="l4-") as folder:
        seen = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(seen))
    else:
        table = Table("what", "seen", title="A narrow Behemoth (synthetic geometry)", title_justify="left")
        for name, value in seen.items():
            table.add_row(name, str(value))
        Console().print(table)
    if seen["lost"] or seen["equal_to_same_cut"] != seen["requests"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
