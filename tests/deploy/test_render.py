"""A plan decides what an overlay runs: counts, sizes, settings; a stale overlay is found, and a bad plan refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from llama4_dist.cli.app import app
from llama4_dist.deploy.overlay_file import OverlaySettings
from llama4_dist.deploy.plan_file import DeployPlan, parse_plan, read_plan
from llama4_dist.deploy.pods import GIB, attention_group, expert_group
from llama4_dist.deploy.serve_files import driver_settings, gateway_settings
from llama4_dist.errors import ConfigError
from tests.deploy.conftest import NAMES, OVERLAYS, ROOT
from tools.manifests.objects import build
from tools.validate_manifests import findings

SETTINGS = OverlaySettings(model_dir="/models/m", model_name="m")  # type: ignore[arg-type]


def document(name: str = "scout-h100", **changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return an overlay's plan with some fields of its parts replaced."""
    made: dict[str, Any] = json.loads((OVERLAYS / name / "plan.json").read_text())
    for part, values in changes.items():
        made[part] |= values
    return made


def plan(name: str = "scout-h100", **changes: Mapping[str, Any]) -> DeployPlan:
    return parse_plan(document(name, **changes))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An overlay in a copy of the manifests."""
    shutil.copytree(ROOT / "deploy" / "kubernetes", tmp_path / "kubernetes")
    return tmp_path / "kubernetes" / "overlays" / "scout-h100"


def render(overlay: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["deploy", "render", "--overlay", str(overlay), *arguments])


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_says_what_its_plan_says(name: str) -> None:
    result = render(OVERLAYS / name, "--check", "--json")
    assert result.exit_code == 0, result.output


def test_another_plan_changes_the_worker_counts_by_one_command(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    changed = document(layout={"groups": 3, "hosts": 12}, hardware={"available": 16})
    other.write_text(json.dumps(changed))
    result = render(copy, "--plan", str(other), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["expert_pods"] == 12
    overlay = build(copy)
    (cluster,) = overlay.of("RayCluster")
    counts = {one["groupName"]: (one["replicas"], one["maxReplicas"]) for one in cluster["spec"]["workerGroupSpecs"]}
    assert counts == {"attention": (3, 3), "experts": (12, 13)}
    budgets = {one["metadata"]["name"]: one["spec"] for one in overlay.of("PodDisruptionBudget")}
    assert budgets["llama4-experts"]["minAvailable"] == 11
    (settings,) = overlay.of("ConfigMap")
    assert yaml.safe_load(settings["data"]["serve.yaml"])["experts"] == 12
    assert findings(overlay, {}) == []
    assert json.loads(render(copy, "--json").stdout)["changed"] == []


def test_a_stale_overlay_is_shown_and_not_touched(copy: Path) -> None:
    generated = copy / "generated" / "serve.yaml"
    generated.write_text(generated.read_text().replace("experts: 6", "experts: 5"))
    result = render(copy, "--check")
    assert result.exit_code == 1
    assert "-experts: 5" in result.stderr
    assert "+experts: 6" in result.stderr
    assert "experts: 5" in generated.read_text()
    assert json.loads(render(copy, "--check", "--json").stdout)["error"]["reason"] == "STALE"
    assert render(copy).exit_code == 0
    assert render(copy, "--check").exit_code == 0


def test_a_file_that_no_plan_makes_is_stale(copy: Path) -> None:
    (copy / "generated" / "old-patch.yaml").write_text("---\n[]\n")
    assert render(copy, "--check").exit_code == 1


def test_a_stage_is_a_pod_with_all_its_ranks_and_a_group_a_unit() -> None:
    cut = plan("behemoth-h200", layout={"stages": 2, "groups": 4})
    group = attention_group(cut, SETTINGS)
    assert (group.replicas, group.pods, group.gpus) == (4, 2, 8)
    assert group.num_pods == 8
    assert group.ray_cores == 8 * SETTINGS.attention_cores + 1, "and the group's leader"
    assert expert_group(cut, SETTINGS).ray_cores == 1, "so that no leader goes where gateways cannot reach it"
    assert group.shm_bytes >= 8 * GIB, "NCCL's segments of eight ranks"
    assert driver_settings(cut, SETTINGS) | {"stages": 2, "tensor": 8, "expert_slices": 2} == driver_settings(
        cut, SETTINGS
    )


def test_a_plan_without_cuts_names_no_setting_of_cuts() -> None:
    assert not {"stages", "tensor", "expert_slices"} & set(driver_settings(plan(), SETTINGS))


def test_a_host_of_several_devices_is_one_pod() -> None:
    wide = plan(layout={"hosts": 3, "gpus_per_host": 2})
    group = expert_group(wide, SETTINGS)
    assert (group.replicas, group.gpus, group.cores) == (3, 2, 8)


def test_a_processors_pod_holds_what_the_plan_says_and_a_gpus_pod_does_not() -> None:
    cpu, gpu = plan("local-cpu"), plan()
    assert expert_group(cpu, SETTINGS).memory_bytes >= cpu.expert_bytes * 1.25
    assert expert_group(cpu, SETTINGS).gpus == 0
    assert expert_group(gpu, SETTINGS).memory_bytes < gpu.expert_bytes, "weights go to the GPU's memory"


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        ({"dtype": "bf16", "wire_dtype": "bf16", "kv_dtype": "bf16"}, {"dtype": "bfloat16", "kv_dtype": "bfloat16"}),
        ({"dtype": "fp8", "wire_dtype": "fp8", "kv_dtype": "fp8"}, {"wire": "float8_e4m3", "kv_dtype": "float8_e4m3"}),
        ({"dtype": "float32", "wire_dtype": "bf16", "kv_dtype": "float32"}, {"dtype": "float32", "wire": "bfloat16"}),
    ],
)
def test_formats_are_said_in_the_settings_words(formats: dict[str, str], told: dict[str, str]) -> None:
    made = driver_settings(plan(layout=formats), SETTINGS)
    assert told.items() <= made.items()
    assert ("wire" in made) == ("wire" in told)


def test_int8_on_processors_is_a_format_of_weights() -> None:
    made = driver_settings(plan("local-cpu", layout={"dtype": "int8"}), SETTINGS)
    assert (made["weights"], made["dtype"], made["device"]) == ("int8", "float32", "cpu")


def test_gateways_take_what_all_groups_decode_together() -> None:
    made = gateway_settings(plan(), SETTINGS)
    assert made["max_num_seqs"] == 2 * 32
    assert made["max_request_s"] <= made["drain_timeout_s"]


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("layout", {"hosts": 0}, "hosts=0 must be a whole number above 0"),
        ("layout", {"hosts": "6"}, "hosts='6'"),
        ("layout", {"hosts": 7}, "uses 9 devices of 8"),
        ("layout", {"ranks": 16, "groups": 1, "hosts": 1}, "uses 17"),
        ("layout", {"kv_dtype": "int3"}, "kv_dtype=int3 of the plan cannot be served"),
        ("layout", {"batch": 70000}, "more than the 65536"),
        ("hardware", {"memory_bytes": 1}, "would hold"),
        ("hardware", {"kind": 3}, "kind=3 must be text"),
        ("model", {"name": ""}, "name=''"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(part: str, values: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {part: values}
    with pytest.raises(ConfigError, match=words):
        driver_settings(plan(**given), SETTINGS)


def test_ranks_of_a_stage_share_a_node() -> None:
    with pytest.raises(ConfigError, match="a node has 8 devices"):
        plan(layout={"ranks": 16, "groups": 1, "hosts": 1}, hardware={"available": 64})


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": "other/1"}', "[" * 100000, '{"schema": "llama4_dist.plan/1"}']
)
def test_a_file_that_is_no_plan_is_exit_code_2(text: str, copy: Path) -> None:
    (copy / "plan.json").write_text(text)
    result = render(copy)
    assert result.exit_code == 2
    assert "plan.json" in result.stderr


@pytest.mark.parametrize("missing", ["layout", "hardware", "model", "workload", "worker_groups"])
def test_a_missing_part_is_named(missing: str) -> None:
    made = document()
    del made[missing]
    with pytest.raises(ConfigError, match=missing):
        parse_plan(made)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model_dir: models\nmodel_name: m\n", "absolute"),
        ("model_dir: /a/../b\nmodel_name: m\n", "absolute"),
        ("model_name: m\n", "model_dir"),
        ("model_dir: /m\nmodel_name: m\ncores: 3\n", "cores"),
        ("model_dir: /m\nmodel_name: m\nattention_cores: 0\n", "attention_cores"),
    ],
)
def test_a_wrong_deploy_file_is_exit_code_2(text: str, words: str, copy: Path) -> None:
    (copy / "deploy.yaml").write_text(text)
    result = render(copy)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_missing_overlay_is_exit_code_2(tmp_path: Path) -> None:
    assert render(tmp_path / "none").exit_code == 2
    with pytest.raises(ConfigError, match="No such file"):
        read_plan(tmp_path / "none.json")


def test_behemoth_says_that_it_is_synthetic() -> None:
    assert plan("behemoth-h200").synthetic
    for file in (OVERLAYS / "behemoth-h200" / "generated").iterdir():
        assert "synthetic" in file.read_text()
    assert "synthetic" in (OVERLAYS / "behemoth-h200" / "kustomization.yaml").read_text()
