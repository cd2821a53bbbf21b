"""`llama4-dist checkpoint quantize` as a person or a script meets it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llama4_dist.cli.app import app
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
    return make_checkpoint(tmp_path_factory.mktemp("source"), "scout", dtype=torch.bfloat16, **shape)


def quantize(*arguments: object) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["checkpoint", "quantize", *map(str, arguments)])
    return found.exit_code, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (["fp8"], "float8, a scale for each output"),
        (["int8"], "int8, a scale for each output"),
        (["int8", "--group-size", 64], "int8, a scale for each 64 inputs"),
        (["int4"], "int4, a scale for each 128 inputs"),
        (["int4", "--group-size", 0], "int4, a scale for each output"),
    ],
)
def test_each_format_is_written_and_can_be_opened(
    arguments: list[object], title: str, source: Path, tmp_path: Path
) -> None:
    code, shown, _ = quantize(source, "--out", tmp_path / "out", "--format", *arguments)
    assert code == 0
    assert title in shown
    assert "tensors that lost most" in shown
    assert CliRunner().invoke(app, ["checkpoint", "verify", str(tmp_path / "out"), "--deep"]).exit_code == 0
    described = CliRunner().invoke(app, ["checkpoint", "inspect", str(tmp_path / "out"), "--json"])
    assert json.loads(described.stdout)["quantisation"] == title


def test_scripts_get_one_document(source: Path, tmp_path: Path) -> None:
    code, shown, errors = quantize(source, "--out", tmp_path / "out", "--format", "int4", "--json")
    document = json.loads(shown)
    assert (code, errors) == (0, "")
    assert document["tensors"] == 4 * 16 * 3
    assert document["kept"] == []
    assert 0.05 < document["mean_relative_error"] < document["worst"][0]["relative"] < 0.2
    assert document["bytes"] < document["source_bytes"] / 2
    again = json.loads(quantize(source, "--out", tmp_path / "out", "--format", "int4", "--json")[1])
    assert again == document | {"kept": document["shards"]}


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--format", "fp8", "--group-size", "128"], 2, "CONFIG_INVALID"),
        (["--format", "int4", "--group-size", "33"], 2, "CONFIG_INVALID"),
        (["--format", "int4", "--group-size", "48"], 2, "CONFIG_INVALID"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    arguments: list[str], code: int, reason: str, source: Path, tmp_path: Path
) -> None:
    found, shown, _ = quantize(source, "--out", tmp_path / "out", "--json", *arguments)
    assert (found, json.loads(shown)["error"]["reason"]) == (code, reason)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_no_checkpoint_is_said_on_stderr(tmp_path: Path) -> None:
    code, shown, errors = quantize(tmp_path, "--out", tmp_path / "out", "--format", "fp8")
    assert (code, shown) == (3, "")
    assert "error: " in errors
    assert "holds neither model.safetensors" in errors
