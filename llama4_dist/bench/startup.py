"""Times a start in fresh processes: import, opening the checkpoint, loading, the first token."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from llama4_dist.errors import EngineError

STATIONS = ("import_package", "import_engine", "open_checkpoint", "load", "first_token")
PROGRAM = (  # of a process that has imported nothing but what Python itself does
    "import json, sys, time; started_s = time.perf_counter(); import llama4_dist; "
    "taken = {'import_package': time.perf_counter() - started_s}; "
    "heavy = sorted({'torch', 'ray', 'grpc', 'numpy'} & set(sys.modules)); "
    "started_s = time.perf_counter(); from llama4_dist.bench import startup; import llama4_dist.llm; "
    "taken['import_engine'] = time.perf_counter() - started_s; "
    "print(json.dumps({'seconds': taken | startup.start(sys.argv[1], sys.argv[2]), 'heavy_imports': heavy}))"
)


def start(model: str, dtype: str) -> dict[str, float]:
    """Open a checkpoint in this process, load it and make one token; return seconds by station."""
    from llama4_dist.bench.offline import BatchRunner
    from llama4_dist.bench.records import PlannedRequest
    from llama4_dist.checkpoint.reader import Checkpoint
    from llama4_dist.engine.options import EngineOptions
    from llama4_dist.llm.open_engine import open_engine
    from llama4_dist.text.tokenizer import load_tokenizer

    began_s = time.perf_counter()
    Checkpoint.open(Path(model)).close()
    load_tokenizer(Path(model))
    opened_s = time.perf_counter()
    engine = open_engine(
        Path(model),
        num_expert_hosts=0,
        num_attention_workers=1,
        options=EngineOptions(),
        ray_address=None,
        progress=None,
        dtype=dtype,
    )
    loaded_s = time.perf_counter()
    try:
        BatchRunner(engine).run([PlannedRequest(at_s=0.0, prompt_token_ids=(1, 2, 3, 4), output_len=1)])
        first_token_s = time.perf_counter()
    finally:
        engine.close()
    return {
        "open_checkpoint": opened_s - began_s,
        "load": loaded_s - opened_s,
        "first_token": first_token_s - loaded_s,
    }


def measure_once(model: Path, dtype: str) -> dict[str, object]:
    """Start one process and return its seconds by station, `process` being the whole of it, and what it imported."""
    began_s = time.perf_counter()
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PROGRAM, str(model), dtype], capture_output=True, text=True, env=dict(os.environ)
    )
    if done.returncode:
        raise EngineError(f"the process that was to start the engine failed: {done.stderr.strip()[-500:]}")
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    seconds = answer["seconds"]
    assert isinstance(seconds, dict)
    seconds["process"] = time.perf_counter() - began_s
    return answer


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return median, least and most seconds by station; `after_imports` is opening, loading and the first token."""
    complete = [run | {"after_imports": run["open_checkpoint"] + run["load"] + run["first_token"]} for run in runs]
    return {
        name: {
            "median_s": statistics.median(run[name] for run in complete),
            "min_s": min(run[name] for run in complete),
            "max_s": max(run[name] for run in complete),
        }
        for name in (*STATIONS, "after_imports", "process")
    }
