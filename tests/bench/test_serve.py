"""The open loop against a real gateway, over sockets; the figures it prints are those of what was sent."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llama4_dist.bench.clients import run_plan
from llama4_dist.bench.records import PlannedRequest
from llama4_dist.cli.app import app
from llama4_dist.client import ConnectOptions
from llama4_dist.gateway.settings import GatewaySettings
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import Served, serving
from tests.waiting import wait_until

ONCE = ConnectOptions(max_attempts=1)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(ScriptedEngine(step_s=0.002)) as running:
        yield running


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def planned(*times_s: float, output_len: int = 5) -> tuple[PlannedRequest, ...]:
    return tuple(PlannedRequest(at_s=at_s, prompt_token_ids=(1, 2), output_len=output_len) for at_s in times_s)


def test_a_rate_sweep_writes_json_and_a_picture(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document, picture = tmp_path / "figures.json", tmp_path / "figures.svg"
    result = bench(
        "--address", served.address, "--rates", "100,200", "--num-requests", "20", "--input-len", "3",
        "--output-len", "4", "--goodput", "ttft:5000", "--json", str(document), "--plot", str(picture),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "p99_ttft_ms" in result.output
    figures = json.loads(document.read_text())
    assert figures["settings"]["model"] == "models/tiny"
    assert "token" not in figures["settings"]
    for rate, found in zip((100.0, 200.0), figures["results"], strict=True):
        assert found["request_rate"] == rate
        assert (found["completed"], found["failed"], found["total_output_tokens"]) == (20, 0, 80)
        assert found["total_input_tokens"] == 60
        assert found["goodput"] == pytest.approx(found["request_throughput"])
        assert 0 < found["median_ttft_ms"] <= found["p99_e2el_ms"]
    assert picture.read_text().startswith("<?xml")


def test_json_on_standard_output_is_all_there_is(served: Served) -> None:
    result = bench(
        "-s", served.address, "--rate", "inf", "--num-requests", "3", "--input-len", "2", "--output-len", "2",
        "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["results"][0]["completed"] == 3


def test_requests_leave_on_time_however_many_still_run() -> None:
    """The engine answers nothing: a closed loop would send one and wait."""
    engine = ScriptedEngine(step_s=0.001)
    engine.paused.set()
    times_s = [0.02 * number for number in range(25)]
    with serving(engine) as served, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_plan, served.address, ONCE, planned(*times_s))
        wait_until(lambda: engine.num_held == 25)
        engine.paused.clear()
        records = running.result()
    assert [record.scheduled_s for record in records] == times_s
    assert all(record.completed and record.output_tokens == 5 for record in records)
    # The first waited until the last had been sent, and that wait is in its figure.
    assert records[0].ttft_s >= times_s[-1]


def test_a_refusal_is_a_result_and_not_retried() -> None:
    engine = ScriptedEngine(running_bound=0, max_waiting=0)
    with serving(engine) as served:
        records = run_plan(served.address, ONCE, planned(0.0, 0.01))
    assert [record.error for record in records] == ["QUEUE_FULL"] * 2
    assert all(record.ended_s >= record.scheduled_s for record in records)


def test_several_client_processes_share_a_plan(served: Served) -> None:
    times_s = [0.01 * number for number in range(10)]
    records = run_plan(served.address, ONCE, planned(*times_s), num_clients=2, num_connections=2)
    assert [record.scheduled_s for record in records] == times_s
    assert all(record.completed for record in records)


def test_a_token_is_sent_and_written_nowhere(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    token = "s3cret-of-the-bench-0123456789abcdef"
    tokens.write_text(f"{token}\n")
    tokens.chmod(0o600)
    document = tmp_path / "figures.json"
    with serving(ScriptedEngine(step_s=0.001), settings=GatewaySettings(token_file=tokens)) as served:
        common = ["-s", served.address, "--num-requests", "2", "--rate", "inf", "--output-len", "2"]
        assert bench(*common).exit_code != 0
        result = bench(*common, "--token", token, "--json", str(document), "--num-clients", "2")
    assert result.exit_code == 0, result.output
    assert json.loads(document.read_text())["results"][0]["completed"] == 2
    assert "s3cret" not in document.read_text() + result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--goodput", "ttft"), "goodput"),
        (("--rates", "1,x"), "rates"),
        (("--rate", "0"), "rates"),
        (("--plot", "figures.gif"), "plot"),
        (("--num-clients", "0"), "num_clients"),
        (("--output-len", "0"), "output_len"),
    ],
)
def test_a_flag_that_cannot_be_is_named_before_anything_is_sent(
    served: Served, arguments: tuple[str, ...], named: str
) -> None:
    result = bench("-s", served.address, *arguments)
    assert result.exit_code == 2
    assert named in result.output


def test_a_picture_without_matplotlib_names_the_extra(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench("-s", served.address, "--plot", str(tmp_path / "figures.png"))
    assert result.exit_code == 2
    assert "pip install 'llama4-dist[bench]'" in result.output
