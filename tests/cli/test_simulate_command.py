"""`llama4-dist simulate` as a person or a script meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llama4_dist.cli.app import app
from llama4_dist.cli.output import EXIT_USAGE

RUN = (
    "simulate", "--model", "scout", "--hardware", "8xH200", "--layout", "groups=2,hosts=4,batch=16", "--rate", "10",
    "--duration", "4s", "--drain", "6s", "--prompt-len", "100", "--output-len", "20",
)  # fmt: skip


def here(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*RUN, *arguments])


def test_the_document_holds_figures_events_and_a_time_line(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    shown = json.loads(here("--event", "kill:1@2", "--json", "--out", str(file)).stdout)
    assert shown == json.loads(file.read_text())
    assert shown["schema"] == "llama4_dist.simulation/1"
    assert shown["figures"]["measured"] is False
    assert shown["figures"]["completed"] > 20
    assert shown["happened"][0]["what"].startswith("host 1 dies")
    assert sum(row["tokens_per_s"] for row in shown["timeline"]) > 0
    assert not {"goodput", "errors"} & set(shown["figures"])


def test_the_table_says_that_nothing_was_measured(tmp_path: Path) -> None:
    chart = tmp_path / "run.svg"
    output = here("--chart", str(chart)).output
    assert "median_ttft_ms" in output
    assert "not measured" in output
    assert "TTFT" in chart.read_text()


def test_a_trace_replaces_the_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at_s": 0.5, "prompt_len": 10, "output_len": 5}\n')
    figures = json.loads(here("--trace", str(trace), "--json").stdout)["figures"]
    assert (figures["completed"], figures["total_output_tokens"]) == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rate", "nan"), "rate=nan"),
        (("--rate", "1e12"), "requests are more than"),
        (("--spread", "2"), "spread=2"),
        (("--event", "kill:7@1"), "hosts are numbered from 0 to 3"),
        (("--event", "nonsense"), "give kill:HOST@SECONDS"),
        (("--source", "tape"), "source='tape'"),
        (("--prompt-len", "20000000"), "prompt_len"),
        (("--max-num-batched-tokens", "0"), "max_num_batched_tokens=0"),
        (("--trace", "/nowhere"), "cannot read trace"),
        (("--chart", "run.gif"), "ends in neither"),
        (("--hardware", "2xH200"), "it needs 6 devices"),
    ],
)
def test_wrong_input_exits_with_2_and_the_reason(arguments: tuple[str, ...], reason: str) -> None:
    result = here(*arguments, "--json")
    assert result.exit_code == EXIT_USAGE, result.output
    assert reason in json.loads(result.stdout)["error"]["message"]
