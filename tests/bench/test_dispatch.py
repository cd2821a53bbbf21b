"""The round trip between two real processes, over both kinds of socket."""

import json
import os

import pytest
from typer.testing import CliRunner

from llama4_dist.cli.app import app


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_round_trip_is_measured_beside_an_echo_of_the_same_bytes(transport: str) -> None:
    cores = os.sched_getaffinity(0)
    flags = ["--tcp"] if transport == "tcp" else []
    command = ["bench", "dispatch", "--rows", "1,8", "--width", "64", "--rounds", "2", "--json", "-", *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["settings"]["transport"] == transport
    assert [found["rows"] for found in document["results"]] == [1, 8]
    assert [found["kilobytes"] for found in document["results"]] == [0.25, 2.0]
    for found in document["results"]:
        assert 0 < found["dispatch_p10_us"] <= found["dispatch_p50_us"] <= found["dispatch_p99_us"]
        assert found["ratio_p50"] == pytest.approx(found["dispatch_p50_us"] / found["echo_p50_us"])
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("flags", [("--rows", "0"), ("--rows", "1,x"), ("--rows", "70000"), ("--width", "0")])
def test_what_cannot_be_measured_is_named(flags: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["bench", "dispatch", *flags])
    assert result.exit_code == 2
    assert flags[0].strip("-") in result.output
