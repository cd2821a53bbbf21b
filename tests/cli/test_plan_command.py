"""`llama4-dist plan` as a person or a script meets it: tables, one JSON document, pictures, exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llama4_dist.cli.app import app
from llama4_dist.cli.output import EXIT_USAGE
from tests.checkpoints import make_checkpoint
from tests.quantised_checkpoints import make_quantised

FLEET = ("plan", "--model", "behemoth", "--hardware", "96xH200")


def here(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def document(*arguments: str) -> dict[str, Any]:
    result = here(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_the_document_says_everything_a_deployment_needs() -> None:
    plan = document(*FLEET, "--slo-tpot", "60ms")
    assert plan["schema"] == "llama4_dist.plan/1"
    assert plan["figures"]["measured"] is False
    assert plan["figures"]["tpot_s"] <= 0.06
    layout, engine = plan["layout"], plan["engine"]
    leader, attention, expert = plan["worker_groups"]
    assert (leader["role"], leader["count"], leader["gpus_per_worker"]) == ("leader", layout["groups"], 0)
    assert attention["count"] == layout["groups"] * layout["stages"] * layout["ranks"]
    assert expert["count"] == layout["hosts"] == engine["num_expert_hosts"]
    assert engine["expert_slices"] == layout["slices"]
    held = expert["layer_slices_held"] * expert["slice_bytes"]
    assert held == expert["gpu_memory_bytes"]
    assert expert["layer_slices_held"] * layout["hosts"] >= 96 * 16 * layout["slices"] * layout["replicas"]
    assert engine["num_blocks"] * engine["block_size"] > 0
    sum_of_gpus = sum(group["count"] * group["gpus_per_worker"] for group in plan["worker_groups"])
    assert sum_of_gpus <= plan["hardware"]["available"]


def test_behemoth_is_called_synthetic_and_figures_computed_everywhere() -> None:
    table = " ".join(here(*FLEET).output.split())
    for text in (table, json.dumps(document(*FLEET)["notes"])):
        assert "synthetic" in text
        assert "not measured" in text
    assert "synthetic" not in here("plan", "--model", "scout", "--hardware", "8xH200").output


def test_a_layout_is_judged_as_it_is_given() -> None:
    plan = document(*FLEET, "--layout", "T=8,groups=4,hosts=16,batch=512,m=2")
    assert plan["figures"]["tpot_s"] == pytest.approx(0.0674, rel=0.01)  # published: 67.4 ms
    assert plan["alternatives"] == []


@pytest.mark.parametrize(("form", "dtype"), [("fp8", "fp8"), ("int8", "int8"), ("int4", "int4")])
def test_a_quantised_folder_is_planned_as_it_is_stored(form: str, dtype: str, tmp_path: Path) -> None:
    folder = make_quantised(tmp_path / "tiny", form)
    flags = ("plan", "--model", str(folder), "--hardware", "4xH200", "--context", "64")
    assert document(*flags)["layout"]["dtype"] == dtype
    assert document(*flags, "--dtype", "bf16")["layout"]["dtype"] == "bf16"


def test_a_checkpoint_folder_is_a_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "scout")
    plan = document("plan", "--model", str(folder), "--hardware", "2xCPU", "--dtype", "float32", "--context", "64")
    assert plan["model"]["name"] == "tiny"
    assert plan["model"]["synthetic"] is False


def test_skew_makes_the_slowest_host_slower() -> None:
    layout = ("--layout", "T=8,groups=4,hosts=16,batch=512,m=2")
    even, skewed = (document(*FLEET, *layout, "--skew", skew)["figures"]["terms"] for skew in ("0", "1"))
    assert skewed["expert_s"] > 1.8 * even["expert_s"]


def test_measured_loads_are_what_a_skew_of_the_same_shape_is(tmp_path: Path) -> None:
    file, layout = tmp_path / "loads.json", ("--layout", "T=8,groups=4,hosts=16,batch=512,m=2")
    file.write_text(json.dumps([1000.0 / (expert + 1) for expert in range(16)]))
    measured = document(*FLEET, *layout, "--loads", str(file))["figures"]
    assert measured["tpot_s"] == pytest.approx(document(*FLEET, *layout, "--skew", "1")["figures"]["tpot_s"], rel=1e-3)


@pytest.mark.parametrize(
    "loads", ["{}", "[1, 2]", "[NaN" + ", 1" * 15 + "]", "[-1" + ", 1" * 15 + "]", str([0] * 16), "["]
)
def test_wrong_loads_are_refused(tmp_path: Path, loads: str) -> None:
    file = tmp_path / "loads.json"
    file.write_text(loads)
    result = here(*FLEET, "--loads", str(file), "--json")
    assert result.exit_code == EXIT_USAGE
    assert "loads" in json.loads(result.stdout)["error"]["message"]


def test_loose_groups_read_experts_once_each() -> None:
    layout = ("--layout", "T=8,groups=8,hosts=16,batch=32")
    pooled, loose = (document(*FLEET, *layout, how)["figures"]["terms"]["expert_s"] for how in ("--pooled", "--loose"))
    assert loose == pytest.approx(8 * pooled, rel=0.02)


def test_a_price_replaces_the_example() -> None:
    assert "example, no quote" in here(*FLEET).output
    output = here(*FLEET, "--price", "7").output
    assert "example, no quote" not in output
    assert document(*FLEET, "--price", "7")["hardware"]["price_per_device_hour"] == 7


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_and_the_document_are_written(tmp_path: Path, suffix: str) -> None:
    chart, file = tmp_path / f"plan{suffix}", tmp_path / "plan.json"
    result = here(*FLEET, "--slo-tpot", "60ms", "--explain", "--chart", str(chart), "--out", str(file))
    assert result.exit_code == 0, result.output
    assert "bind" in result.output
    assert json.loads(file.read_text())["schema"] == "llama4_dist.plan/1"
    assert chart.stat().st_size > 10_000
    if suffix == ".svg":
        assert "slowest expert host" in chart.read_text()


def test_the_same_plan_is_the_same_bytes(tmp_path: Path) -> None:
    charts = [tmp_path / "one.svg", tmp_path / "two.svg"]
    outputs = [here(*FLEET, "--json", "--chart", str(chart)).stdout for chart in charts]
    assert outputs[0] == outputs[1]
    assert charts[0].read_bytes() == charts[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--hardware", "8xH200"), "the smallest needs 18 devices"),
        (("--hardware", "96H200"), "give e.g. 96xH200"),
        (("--hardware", "96xH300"), "is not in the table"),
        (("--hardware", "0xH200"), "from 1 to"),
        (("--layout", "T=3,groups=1,hosts=16"), "num_ranks=3 does not divide"),
        (("--layout", "T=8,groups=1,hosts=8"), "an expert GPU would hold 227.1 GB"),
        (("--layout", "T=8,groups=1,hosts=16,batch=4000"), "at most 556 fit"),
        (("--batch", "0"), "batch=0 must be from 1"),
        (("--batch", "1000000"), "sequences at most"),
        (("--context", "0"), "context=0"),
        (("--context", "99999999"), "context=99999999"),
        (("--slo-tpot", "1ms"), "the fastest"),
        (("--price", "nan"), "price=nan"),
        (("--price", "-1"), "price=-1"),
        (("--skew", "nan"), "skew=nan"),
        (("--alpha-us", "-1"), "alpha_s"),
        (("--memory-share", "0"), "memory_share=0"),
        (("--dtype", "fp3"), "fp3"),
        (("--kv-dtype", "int4"), "kv_dtype='int4'"),
        (("--link", "carrier-pigeon"), "neither nic nor nvlink"),
        (("--objective", "beauty"), "none of throughput, latency, cost"),
        (("--top", "0"), "top=0"),
        (("--chart", "plan.gif"), "ends in neither"),
        (("--out", "/nowhere/plan.json"), "cannot write"),
        (("--model", "llama5"), "neither scout, maverick, behemoth nor a checkpoint folder"),
        (("--replicas", "0"), "replicas=0"),
    ],
)
def test_what_is_impossible_or_wrong_exits_with_2_and_the_reason(arguments: tuple[str, ...], reason: str) -> None:
    result = here(*FLEET, *arguments, "--json")
    assert result.exit_code == EXIT_USAGE, result.output
    assert reason in json.loads(result.stdout)["error"]["message"]


def test_planning_loads_neither_torch_nor_ray_nor_grpc() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from llama4_dist.cli.app import app\n"
        f"result = CliRunner().invoke(app, {list(FLEET)!r})\n"
        "print(result.exit_code, [name for name in ('torch', 'ray', 'grpc', 'matplotlib') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.strip() == "0 []"
