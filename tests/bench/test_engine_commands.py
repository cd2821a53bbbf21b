"""latency, throughput and startup on a real tiny checkpoint; the import of the package stays light."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llama4_dist.bench.offline import Batch, BatchRunner, latency_figures, profile, throughput_figures
from llama4_dist.bench.records import PlannedRequest
from llama4_dist.bench.startup import summary
from llama4_dist.cli.app import app
from llama4_dist.engine.port import EngineStats
from llama4_dist.errors import EngineError
from tests.checkpoints import make_checkpoint
from tests.gateway.scripted_engine import ScriptedEngine

MAX_IMPORT_S = 0.3
HEAVY = {"torch", "ray", "grpc", "numpy", "pydantic", "transformers"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "scout")


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.stdout


def document(*arguments: str) -> Any:
    code, output = bench(*arguments, "--json", "-")
    assert code == 0, output
    return json.loads(output)["results"]


def test_latency_of_a_batch(model_dir: Path) -> None:
    found = document(
        "latency", "--model", str(model_dir), "--batch-size", "2", "--input-len", "4", "--output-len", "3",
        "--num-iters", "2", "--num-threads", "1",
    )  # fmt: skip
    assert found["batch_size"] == 2
    assert 0 < found["median_ttft_ms"] < found["avg_latency_ms"]
    assert 0 < found["median_step_ms"] < found["avg_latency_ms"]


def test_throughput_with_its_stations(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, output = bench(
        "throughput", "--model", str(model_dir), "--num-prompts", "5", "--input-len", "6", "--output-len", "4",
        "--num-threads", "1", "--profile", "--json", str(file),
    )  # fmt: skip
    assert code == 0, output
    assert "Where the time went" in output
    found = json.loads(file.read_text())["results"]
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 20)
    assert found["output_throughput"] == pytest.approx(20 / found["elapsed_time"])
    shares = {row["station"]: row["share"] for row in found["stations"]}
    assert {"schedule", "expert", "sample", "idle"} <= set(shares)
    assert "model" not in shares  # the sum of others
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.05)


def test_a_start_is_timed_in_processes_of_its_own(model_dir: Path) -> None:
    found = document("startup", "--model", str(model_dir), "--rounds", "1")
    seconds = {name: figure["median_s"] for name, figure in found["seconds"].items()}
    parts = ("import_package", "import_engine", "open_checkpoint", "load", "first_token")
    assert all(seconds[name] > 0 for name in parts)
    assert sum(seconds[name] for name in parts) < seconds["process"]
    assert seconds["after_imports"] == pytest.approx(sum(seconds[name] for name in parts[2:]))
    assert found["imported_by_the_package"] == []


def test_the_package_imports_nothing_heavy() -> None:
    """The least of three tries is held to the bound: a busy machine makes any single one slow."""
    program = (
        "import sys, time; began = time.perf_counter(); import llama4_dist; taken = time.perf_counter() - began; "
        f"print(taken, sorted({HEAVY!r} & set(sys.modules)))"
    )
    answers = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split(
            None, 1
        )
        for _ in range(3)
    ]
    assert {heavy.strip() for _, heavy in answers} == {"[]"}
    assert min(float(seconds) for seconds, _ in answers) < MAX_IMPORT_S


def test_figures_of_two_batches_by_hand() -> None:
    batches = [Batch(steps=((0.5, 2), (0.6, 2), (0.8, 2)), seconds=0.8), Batch(steps=((0.1, 2), (0.2, 2)), seconds=0.2)]
    found = latency_figures(batches)
    assert found["avg_latency_ms"] == pytest.approx(500.0)
    assert found["mean_ttft_ms"] == pytest.approx(300.0)
    assert found["median_step_ms"] == pytest.approx(100.0)  # 100, 200 and 100
    assert found["output_throughput"] == pytest.approx(10.0)


def test_throughput_by_hand() -> None:
    requests = [PlannedRequest(at_s=0.0, prompt_token_ids=(1, 2, 3), output_len=2)] * 2
    found = throughput_figures(Batch(steps=((0.5, 2), (2.0, 2)), seconds=2.0), requests)
    assert (found["requests_per_second"], found["output_throughput"], found["total_token_throughput"]) == (1, 2, 5)


def test_a_profile_counts_between_two_readings() -> None:
    before = EngineStats(steps=10, station_seconds={"schedule": 1.0, "model": 9.0, "other": 9.0})
    after = EngineStats(steps=20, station_seconds={"schedule": 1.5, "model": 10.0, "other": 10.0})
    rows = {str(row["station"]): row for row in profile(before, after, 2.0)}
    assert set(rows) == {"schedule", "other", "idle"}
    assert rows["schedule"]["share"] == pytest.approx(0.25)
    assert rows["other"]["ms_per_step"] == pytest.approx(100.0)
    assert rows["idle"]["seconds"] == pytest.approx(0.5)


def test_the_summary_of_starts_by_hand() -> None:
    run = {"import_package": 0.1, "import_engine": 2.0, "open_checkpoint": 0.2, "load": 0.5, "first_token": 0.3}
    found = summary([run | {"process": 4.0}, run | {"load": 0.7, "process": 5.0}, run | {"process": 9.0}])
    assert found["after_imports"] == {
        "median_s": pytest.approx(1.0),
        "min_s": pytest.approx(1.0),
        "max_s": pytest.approx(1.2),
    }
    assert found["process"]["median_s"] == 5.0


@pytest.fixture
def scripted() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(step_s=0.001)
    yield engine
    engine.close()


def test_a_batch_keeps_the_step_of_every_token(scripted: ScriptedEngine) -> None:
    runner = BatchRunner(scripted)
    batch = runner.run([PlannedRequest(at_s=0.0, prompt_token_ids=(1,), output_len=4)] * 3)
    assert sum(number for _, number in batch.steps) == 12
    assert len(batch.gaps_s) == len(batch.steps) - 1
    assert batch.seconds == batch.steps[-1][0]


def test_a_request_that_fails_fails_the_benchmark(scripted: ScriptedEngine) -> None:
    scripted.fail_at[2] = EngineError("broken on purpose")
    with pytest.raises(EngineError, match="on purpose"):
        BatchRunner(scripted).run([PlannedRequest(at_s=0.0, prompt_token_ids=(1,), output_len=4)])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("throughput", "--num-prompts", "0"), "num_prompts"),
        (("throughput", "--input-len", "100000000"), "input_len"),
        (("latency", "--num-iters", "0"), "num_iters"),
        (("startup", "--rounds", "0"), "rounds"),
    ],
)
def test_what_cannot_be_measured_is_named(model_dir: Path, arguments: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments, "--model", str(model_dir)])
    assert result.exit_code == 2
    assert named in result.output
