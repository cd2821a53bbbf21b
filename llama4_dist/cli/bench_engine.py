"""`llama4-dist bench latency|throughput|startup`: an engine of this process, or fresh processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama4_dist.bench import dispatch, startup
from llama4_dist.bench.arrivals import plan
from llama4_dist.bench.offline import BatchRunner, latency_figures, profile, throughput_figures
from llama4_dist.bench.records import wrong
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.cli.bench_report import STDOUT, counting, show_columns, shown, write
from llama4_dist.cli.output import print_rows, reporting
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.port import Engine
from llama4_dist.llm.open_engine import open_engine

MAX_ROWS = 65536
LATENCY = (
    "avg_latency_ms",
    "p50_latency_ms",
    "p99_latency_ms",
    "median_ttft_ms",
    "mean_step_ms",
    "median_step_ms",
    "p99_step_ms",
    "output_throughput",
)
THROUGHPUT = (
    "elapsed_time",
    "total_input_tokens",
    "total_output_tokens",
    "requests_per_second",
    "output_throughput",
    "total_token_throughput",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBench:
    """Which engine, and how long the requests are in tokens; `number` are prompts, or sequences of a batch."""

    model: Path
    number: int
    input_len: int
    output_len: int
    dtype: str
    weights: str
    num_threads: int | None
    seed: int
    iterations: int = 1
    warmups: int = 1


def run_bench_latency(bench: EngineBench, json_file: Path | None) -> None:
    """Run the same batch several times and show how long it and its steps take."""
    quiet = json_file == STDOUT
    with reporting(quiet):
        if bench.iterations < 1:
            raise wrong("num_iters", f"{bench.iterations}: give at least 1")
        with opened(bench) as engine:
            runner = BatchRunner(engine)
            requests = requests_of(bench, engine)
            for _ in range(bench.warmups):
                runner.run(requests)
            batches = []
            with counting("batches", bench.iterations, quiet=quiet) as on_done:
                for done in range(bench.iterations):
                    batches.append(runner.run(requests))
                    on_done(done + 1)
        result = {"batch_size": bench.number, **latency_figures(batches)}
        if write(json_file, "latency", asdict(bench), result):
            show_columns(title(bench), LATENCY, [result], "batch_size")


def run_bench_throughput(bench: EngineBench, with_profile: bool, json_file: Path | None) -> None:
    """Give the engine all prompts at once and show tokens a second, and where the time went."""
    quiet = json_file == STDOUT
    with reporting(quiet):
        with opened(bench) as engine:
            runner = BatchRunner(engine)
            requests = requests_of(bench, engine)
            runner.run(requests[:1])  # what is done once is no throughput
            before = engine.stats()
            with counting("prompts", bench.number, quiet=quiet) as on_done:
                batch = runner.run(requests, on_done)
            stations = profile(before, engine.stats(), batch.seconds)
        result: dict[str, Any] = {"num_prompts": bench.number, **throughput_figures(batch, requests)}
        if with_profile:
            result["stations"] = stations
        if write(json_file, "throughput", asdict(bench), result):
            show_columns(title(bench), THROUGHPUT, [result], "num_prompts")
            if with_profile:
                columns = ("station", "seconds", "share", "ms_per_step")
                print_rows("Where the time went", columns, [[shown(row[name]) for name in columns] for row in stations])


def run_bench_startup(model: Path, dtype: str, rounds: int, json_file: Path | None) -> None:
    """Start fresh processes and show the median of each station."""
    quiet = json_file == STDOUT
    with reporting(quiet):
        if rounds < 1:
            raise wrong("rounds", f"{rounds}: give at least 1")
        Checkpoint.open(model).close()  # a folder that is none fails here, in words
        runs: list[dict[str, Any]] = []
        with counting("processes", rounds, quiet=quiet) as on_done:
            for done in range(rounds):
                runs.append(startup.measure_once(model, dtype))
                on_done(done + 1)
        figures = startup.summary([run["seconds"] for run in runs])
        heavy = sorted({name for run in runs for name in run["heavy_imports"]})
        if write(
            json_file,
            "startup",
            {"model": model, "dtype": dtype, "rounds": rounds},
            {"seconds": figures, "imported_by_the_package": heavy},
        ):
            rows = [[name, *(f"{value:.3f}" for value in figure.values())] for name, figure in figures.items()]
            print_rows(
                f"Start of {model.name}, seconds, {rounds} processes", ("station", "median", "least", "most"), rows
            )


@contextmanager
def opened(bench: EngineBench) -> Iterator[Engine]:
    """Yield the engine, loaded."""
    options = EngineOptions(
        max_waiting=max(EngineOptions().max_waiting, bench.number), model_name=bench.model.resolve().name
    )
    engine = open_engine(
        bench.model,
        num_expert_hosts=0,
        num_attention_workers=1,
        options=options,
        ray_address=None,
        progress=None,
        dtype=bench.dtype,
        weights=bench.weights,
        num_threads=bench.num_threads,
    )
    try:
        yield engine
    finally:
        engine.close()


def requests_of(bench: EngineBench, engine: Engine) -> Any:
    """Draw the prompts; refuse lengths that the context does not hold."""
    if bench.number < 1:
        raise wrong("num_prompts", f"{bench.number}: give at least 1")
    if bench.input_len + bench.output_len > engine.limits.max_context:
        raise wrong(
            "input_len",
            f"{bench.input_len} + {bench.output_len} tokens exceed the context of {engine.limits.max_context}",
        )
    return plan(
        [0.0] * bench.number,
        input_len=bench.input_len,
        output_len=bench.output_len,
        vocab_size=engine.limits.vocab_size,
        seed=bench.seed,
    )


def title(bench: EngineBench) -> str:
    """Name what was run."""
    return f"{bench.model.name}: {bench.input_len} tokens in, {bench.output_len} out"


def run_bench_dispatch(rows: str, width: int, rounds: int, tcp: bool, json_file: Path | None) -> None:
    """Measure the round trip for each number of rows and show it beside the bare echo."""
    quiet = json_file == STDOUT
    with reporting(quiet):
        numbers = [int(part) if part.isdecimal() else 0 for part in rows.split(",")]
        if not all(0 < number <= MAX_ROWS for number in numbers):
            raise wrong("rows", f"{rows!r}: give numbers of 1 to {MAX_ROWS}, e.g. 1,16,256")
        for field, value in (("width", width), ("rounds", rounds)):
            if value < 1:
                raise wrong(field, f"{value}: give at least 1")
        with counting("sizes", len(numbers), quiet=quiet) as on_done:
            results = dispatch.measure_dispatch(numbers, width=width, rounds=rounds, tcp=tcp, on_done=on_done)
        transport = "tcp" if tcp else "unix"
        settings = {"rows": numbers, "width": width, "rounds": rounds, "transport": transport}
        if write(json_file, "dispatch", settings, results):
            names = [name for name in results[0] if name != "rows"]
            show_columns(f"Round trip of rows of {width} float32 over {transport} sockets", names, results, "rows")
