"""`llama4-dist checkpoint` as a person or a script meets it: what is written, shown, proved and refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llama4_dist.cli.app import app
from llama4_dist.cli.flags import parse_bytes
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
NARROW = ("--preset", "maverick", "--scale", "1/64", "--set", "num_hidden_layers=2")


def here(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


def document(*arguments: str | Path) -> dict[str, Any]:
    done = here(*arguments, "--json")
    assert done.exit_code == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    document("synth", *NARROW, "--out", folder)
    return folder


@pytest.mark.parametrize("shape", ["16 1 1 1 1", "32 2 1 1 1", "64 4 1 1 1", "16 1 2 1 1", "16 1 1 4 8"])
def test_two_trillion_parameters_are_proved_in_seconds_and_little_memory(tmp_path: Path, shape: str) -> None:
    model = tmp_path / "behemoth"
    made = document("synth", "--preset", "behemoth", "--sparse", "--out", model)
    assert made["apparent_bytes"] > 3.9e12
    assert made["allocated_bytes"] < 20e6
    flags = zip(("--hosts", "--slices", "--replicas", "--stages", "--tensor"), shape.split(), strict=True)
    # VmHWM, not getrusage: that one begins with what the process had that forked this one.
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from llama4_dist.cli.app import app\n"
        "try: app()\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "checkpoint", "verify", str(model), "--json"]
    done = subprocess.run(
        [*command, *(word for flag in flags for word in flag)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["faults"] == []
    assert report["num_parameters"] == 1_991_729_233_920
    assert int(done.stderr.split()[-1]) < 1_000_000  # KiB


def test_inspect_shows_that_a_checkpoint_is_synthetic_and_sparse(tmp_path: Path) -> None:
    document("synth", "--preset", "behemoth", "--sparse", "--out", tmp_path / "model")
    shown = document("inspect", tmp_path / "model")
    assert shown["origin"]["preset"] == "behemoth"
    assert shown["is_sparse"] is True
    assert shown["allocated_bytes"] < 20e6 < 3.9e12 < shown["file_bytes"]
    kinds = shown["parameters_by_kind"]
    assert kinds["routed experts"] == 96 * 16 * 3 * 16384 * 24064
    assert kinds["shared experts"] == 96 * 3 * 16384 * 24064
    assert sum(kinds.values()) == shown["num_parameters"]
    table = here("inspect", tmp_path / "model").stdout
    assert "never published" in table
    assert "sparse" in table


def test_the_old_name_of_inspect_still_answers(tiny: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(tiny), "--json"])
    assert json.loads(done.stdout) == document("inspect", tiny)


def test_deep_verification_reads_every_byte(tiny: Path, tmp_path: Path) -> None:
    assert document("verify", tiny, "--deep")["every_byte_read"] is True
    document("convert", tiny, "--layout", "per_expert", "--out", tmp_path / "copy")
    shard = tmp_path / "copy" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-2:] = b"\xff\x7f"  # a bfloat16 that is no number
    shard.write_bytes(raw)
    assert here("verify", tmp_path / "copy").exit_code == 0
    done = here("verify", tmp_path / "copy", "--deep")
    assert done.exit_code == 3
    assert "lm_head.weight" in done.stderr


@pytest.fixture
def plan(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    document("verify", tiny, "--hosts", "4", "--slices", "2", "--save-plan", path)
    return path


def test_a_plan_without_a_host_fails_with_tensor_range_and_workers(tiny: Path, plan: Path) -> None:
    content = json.loads(plan.read_text())
    lost = content["hosts"].pop("expert-2")
    plan.write_text(json.dumps(content))
    done = here("verify", tiny, "--plan", plan, "--json")
    assert done.exit_code == 1
    faults = json.loads(done.stdout)["faults"]
    layer, expert, number = min(lost)
    first = next(fault for fault in faults if fault["tensor"].endswith("down_proj"))
    # Rows of the down projection are columns of the expert: 128 of each, here in two slices of 64.
    assert first["tensor"] == f"model.layers.{layer}.feed_forward.experts.down_proj"
    assert first["rows"][0] == 128 * expert + 64 * number
    assert (first["workers"], first["num_intended"]) == ([], 1)
    assert first["bytes"][0] >= first["rows"][0] * 80 * 2
    shown = here("verify", tiny, "--plan", plan)
    assert shown.exit_code == 1
    assert "is opened by nobody; 1 are meant to" in shown.stderr


def test_a_plan_with_an_overlap_names_both_workers(tiny: Path, plan: Path) -> None:
    content = json.loads(plan.read_text())
    content["hosts"]["expert-1"].append(content["hosts"]["expert-0"][0])
    plan.write_text(json.dumps(content))
    done = here("verify", tiny, "--plan", plan)
    assert done.exit_code == 1
    assert "opened by expert-0, expert-1; 1 are meant to" in done.stderr


def test_a_layout_that_the_planner_found_is_proved_and_one_for_another_model_refused(tmp_path: Path) -> None:
    model, planned = tmp_path / "scout", tmp_path / "planned.json"
    document("synth", "--preset", "scout", "--sparse", "--out", model)
    command = ["plan", "--model", "scout", "--hardware", "8xH200", "--replicas", "2", "--out", str(planned), "--json"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.stderr
    layout = json.loads(planned.read_text())["layout"]
    proved = document("verify", model, "--plan", planned)
    assert proved["shape"]["hosts"] == layout["hosts"]
    assert proved["shape"]["replicas"] == layout["replicas"] == 2
    content = json.loads(planned.read_text())
    content["model"]["expert_width"] = 4096
    planned.write_text(json.dumps(content))
    refused = here("verify", model, "--plan", planned)
    assert refused.exit_code == 2
    assert "plans for expert_width=4096, the checkpoint has 8192" in refused.stderr


def test_one_host_takes_its_own_part_from_a_shared_disk(tiny: Path, plan: Path, tmp_path: Path) -> None:
    written = document("shard", tiny, "--plan", plan, "--host", "expert-3", "--out", tmp_path / "mine")
    assert [part["name"] for part in written["parts"]] == ["expert-3"]
    shown = document("inspect", tmp_path / "mine")
    assert shown["part"] == "expert-3"
    assert shown["model_hash"] == document("inspect", tiny)["model_hash"]
    assert here("verify", tmp_path / "mine", "--deep").exit_code == 0
    assert here("verify", tmp_path / "mine", "--hosts", "2").exit_code == 2


def test_other_shards_are_the_same_model(tiny: Path, tmp_path: Path) -> None:
    document("shard", tiny, "--shard-size", "1MB", "--out", tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 3
    assert document("inspect", tmp_path / "copy")["model_hash"] == document("inspect", tiny)["model_hash"]


def test_conversion_there_and_back_is_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    document("convert", tiny, "--to", "meta", "--out", tmp_path / "meta")
    document("convert", tmp_path / "meta", "--to", "hf", "--out", tmp_path / "back")
    for file in tiny.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def damaged(folder: Path, damage: str) -> Path:
    path = make_checkpoint(folder, "scout")
    shard, index = path / "model-00002-of-00002.safetensors", path / "model.safetensors.index.json"
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        content = json.loads(index.read_text())
        del content["weight_map"]["model.norm.weight"]
        index.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("damage", "named"), [("cut", "cut short"), ("unlisted", "model.norm.weight")])
@pytest.mark.parametrize(
    "command", [["verify"], ["shard", "--out", "{new}"], ["convert", "--to", "meta", "--out", "{new}"]]
)
def test_a_damaged_original_is_named_and_nothing_is_written(
    tmp_path: Path, damage: str, named: str, command: list[str]
) -> None:
    path, new = damaged(tmp_path / "model", damage), tmp_path / "new"
    done = here(command[0], path, *(word.format(new=new) for word in command[1:]))
    assert done.exit_code == 3
    assert named in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["synth", "--preset", "giant", "--out", "{new}"], 2, "behemoth"),
        (["synth", "--preset", "scout", "--scale", "1/7", "--out", "{new}"], 2, "hidden_size"),
        (["synth", *NARROW, "--out", "{tiny}"], 2, "not empty"),
        (["synth", *NARROW, "--shard-size", "many", "--out", "{new}"], 2, "no size"),
        (["verify", "{tiny}", "--hosts", "0"], 2, "no expert host"),
        (["verify", "{tiny}", "--hosts", "2", "--replicas", "3"], 2, "num_replicas=3"),
        (["verify", "{tiny}", "--hosts", "2", "--slices", "999"], 2, "999"),
        (["verify", "{tiny}", "--hosts", "2", "--tensor", "2"], 2, "num_ranks=2"),
        (["verify", "{tiny}", "--hosts", "2", "--stages", "0"], 2, "num_stages=0"),
        (["verify", "{tiny}", "--plan", "absent.json"], 2, "absent.json"),
        (["verify", "absent", "--hosts", "2"], 3, "absent"),
        (["shard", "{tiny}", "--out", "{new}", "--host", "expert-0"], 2, "--hosts or --plan"),
        (["shard", "{tiny}", "--out", "{new}", "--hosts", "2", "--host", "expert-9"], 2, "expert-9"),
        (["convert", "{tiny}", "--out", "{new}"], 2, "fused already"),
    ],
)
def test_wrong_usage_is_named_and_nothing_is_written(
    tiny: Path, tmp_path: Path, arguments: list[str], code: int, named: str
) -> None:
    done = here(*(argument.format(tiny=tiny, new=tmp_path / "new") for argument in arguments))
    assert done.exit_code == code, done.stderr
    assert named in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"), [("10GB", 10**10), ("512MiB", 2**29), ("1.5 KB", 1500), ("7", 7), ("2TiB", 2**41)]
)
def test_sizes_are_read_with_decimal_and_binary_units(given: str, expected: int) -> None:
    assert parse_bytes(given) == expected
