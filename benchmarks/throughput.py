"""Decode throughput at one batch size: one process, a cluster, and transformers, on the same random checkpoint.

Two comparisons one after the other: one process with transformers, then, on a running Ray, a cluster with one process.
The two of a comparison are loaded before anything is measured and take turns, so that drift of the machine falls on
both; the medians of the rounds count. Prefill is left out: the clock starts when the last sequence has its first token.
Acceptance: one process >= 3 x transformers, cluster >= 0.8 x one process.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Llama4ForCausalLM

from cluster.ray_engine import RayEngine
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.port import Engine
from llama4_dist.request import EngineRequest, Sampling, TokenOutput
from tests.checkpoints import make_checkpoint

# About 340 million parameters, nine tenths of them in experts: Scout's shape with small widths.
GEOMETRY = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "vocab_size": 8192,
    "attention_chunk_size": 256,
}
PROMPT_TOKENS = 32
TIMEOUT_S = 600
SINGLE, CLUSTER, TRANSFORMERS = "one process", "cluster", "transformers"

Prompts = Sequence[tuple[int, ...]]
Decode = Callable[[Prompts, int], float]  # prompts, tokens per sequence → tokens per second
Speeds = dict[str, list[float]]  # contender to tokens per second, one a round


class EngineDecoder:
    """Decodes a batch on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._events: list[tuple[float, TokenOutput]] = []
        self._round = 0
        engine.start(self._collect)

    def __call__(self, prompts: Prompts, num_tokens: int) -> float:
        self._round += 1
        self._events = []
        sampling = Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            request_id = f"{self._round}/{index}"
            self._engine.submit(EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_ended() == len(prompts), TIMEOUT_S):
                raise SystemExit(f"the requests did not end within {TIMEOUT_S} s")
        return decode_rate(self._events)

    def _num_ended(self) -> int:
        return sum(output.finish_reason is not None or output.error is not None for _, output in self._events)

    def _collect(self, outputs: Sequence[TokenOutput]) -> None:
        now = time.perf_counter()
        with self._changed:
            self._events += [(now, output) for output in outputs]
            self._changed.notify_all()


def decode_rate(events: Sequence[tuple[float, TokenOutput]]) -> float:
    """Return tokens per second from the moment every sequence has one."""
    first: dict[str, float] = {}
    for at, output in events:
        if output.error is not None:
            raise SystemExit(f"a request failed: {output.error}")
        first.setdefault(output.request_id, at)
    started, ended = max(first.values()), events[-1][0]
    return sum(len(output.token_ids) for at, output in events if at > started) / (ended - started)


class TransformersDecoder:
    """Decodes with the reference implementation in a process of its own: its OpenMP team would slow the engine's."""

    def __init__(self, model_dir: Path, dtype: str, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(
            target=serve_transformers, args=(child_end, model_dir, dtype, num_threads), daemon=True
        )
        self._process.start()
        self._connection.recv()  # loaded

    def __call__(self, prompts: Prompts, num_tokens: int) -> float:
        self._connection.send((prompts, num_tokens))
        return float(self._connection.recv())

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def serve_transformers(connection: Connection, model_dir: Path, dtype: str, num_threads: int) -> None:
    """Answer each (prompts, tokens) with tokens per second."""
    torch.set_num_threads(num_threads)
    model = Llama4ForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    connection.send("loaded")
    while True:
        prompts, num_tokens = connection.recv()
        connection.send(transformers_rate(model, prompts, num_tokens))


@torch.inference_mode()
def transformers_rate(model: Llama4ForCausalLM, prompts: Prompts, num_tokens: int) -> float:
    """Decode greedily with the model's own cache; the prefill is left out."""
    output = model(input_ids=torch.tensor(prompts), use_cache=True)
    started = time.perf_counter()
    for _ in range(num_tokens - 1):
        next_ids_B1 = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=next_ids_B1, past_key_values=output.past_key_values, use_cache=True)
    return len(prompts) * (num_tokens - 1) / (time.perf_counter() - started)


def measure(contenders: Mapping[str, Decode], arguments: argparse.Namespace) -> Speeds:
    """Warm every contender up once, then let them take turns."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 200, (arguments.batch, PROMPT_TOKENS), generator=generator)
    prompts = [tuple(row) for row in token_ids.tolist()]
    for decode in contenders.values():
        decode(prompts, 4)
    speeds: Speeds = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, decode in contenders.items():
            speeds[name].append(decode(prompts, arguments.tokens))
    return speeds


def compare_transformers(arguments: argparse.Namespace, model_dir: Path) -> Speeds:
    """One process and the reference implementation in turns; no Ray runs, whose daemons take a twentieth of a core."""
    with ExitStack() as resources:
        reference = TransformersDecoder(model_dir, arguments.dtype, arguments.threads)
        resources.callback(reference.close)
        return measure({SINGLE: one_process(arguments, model_dir, resources), TRANSFORMERS: reference}, arguments)


def compare_cluster(arguments: argparse.Namespace, model_dir: Path) -> Speeds:
    """A cluster and one process in turns on the same cores."""
    with ExitStack() as resources:
        cluster = RayEngine(
            model_dir,
            num_expert_hosts=arguments.experts,
            options=engine_options(arguments),
            num_threads=arguments.attention_threads,
            expert_threads=arguments.expert_threads,
        )
        resources.callback(cluster.close)
        single = one_process(arguments, model_dir, resources)
        return measure({CLUSTER: EngineDecoder(cluster), SINGLE: single}, arguments)


def one_process(arguments: argparse.Namespace, model_dir: Path, resources: ExitStack) -> EngineDecoder:
    engine = build_single_process(model_dir, options=engine_options(arguments), num_threads=arguments.threads)
    resources.callback(engine.close)
    return EngineDecoder(engine)


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    return EngineOptions(num_blocks=512, max_num_seqs=max(16, arguments.batch))


def report(comparisons: Sequence[tuple[Speeds, float]], arguments: argparse.Namespace) -> dict[str, object]:
    """Print the table and return what `--json` writes. Each comparison is of its first contender with its second."""
    table = Table(title=f"decode, batch {arguments.batch}, {arguments.dtype}, {arguments.threads} threads")
    for column in ("engine", "tokens/s", "spread", "against", "tokens/s", "spread", "ratio", "floor"):
        table.add_column(column, justify="left" if column in ("engine", "against") else "right")
    ratios = {}
    for speeds, floor in comparisons:
        (name, values), (other, others) = speeds.items()
        ratios[f"{name} / {other}"] = ratio = statistics.median(values) / statistics.median(others)
        verdict = f"{floor:.1f} {'met' if ratio >= floor else 'MISSED'}"
        table.add_row(name, *shown(values), other, *shown(others), f"{ratio:.2f}", verdict)
    Console(width=120).print(table)
    return {"settings": vars(arguments), "tokens_per_second": [speeds for speeds, _ in comparisons], "ratios": ratios}


def shown(values: Sequence[float]) -> tuple[str, str]:
    """Return median and spread of some rounds."""
    return f"{statistics.median(values):.1f}", f"{min(values):.0f}–{max(values):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="per sequence and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--experts", type=int, default=2, help="expert hosts of the cluster")
    parser.add_argument("--threads", type=int, default=2, help="of the single process and of transformers")
    parser.add_argument("--attention-threads", type=int, default=1)
    parser.add_argument("--expert-threads", type=int, default=1)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # this thread only prepares; the engine's has its own setting
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="llama4-bench-")))
        model_dir = make_checkpoint(folder, "scout", dtype=getattr(torch, arguments.dtype), **GEOMETRY)
        comparisons = []
        if not arguments.without_transformers:
            comparisons.append((compare_transformers(arguments, model_dir), 3.0))
        comparisons.append((compare_cluster(arguments, model_dir), 0.8))
        figures = report(comparisons, arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
