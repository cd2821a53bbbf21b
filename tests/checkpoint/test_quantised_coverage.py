"""The proof of coverage counts the tensors that quantised linears are stored as, and says where a plan leaves some."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama4_dist.checkpoint.blocks import Block
from llama4_dist.checkpoint.cluster_shape import ClusterShape
from llama4_dist.checkpoint.coverage import Coverage, prove_coverage
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.shard import Shard
from llama4_dist.cli.app import app
from llama4_dist.model.weights import Weights
from tests.checkpoint.test_coverage import shape_of, without
from tests.model.test_quantised_store import CPU
from tests.quantised_checkpoints import ALL, make_quantised
from tests.stages.test_quantised_group import FOUR_RANKS

FORMS = [*ALL, "int8-plain"]


def coverage(checkpoint: Checkpoint, shape: ClusterShape) -> Coverage:
    return prove_coverage(
        checkpoint.config, checkpoint.layout, shape, quantised=checkpoint.quantised, scheme=checkpoint.scheme
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numbers", [(2, 1, 1, 1, 1), (3, 4, 2, 2, 4)])
def test_every_stored_tensor_is_opened_as_often_as_meant(
    form: str, numbers: tuple[int, int, int, int, int], tmp_path: Path
) -> None:
    path = make_quantised(tmp_path, form, "maverick", linears=True, num_local_experts=4, **FOUR_RANKS)
    checkpoint = Checkpoint.open(path)
    proof = coverage(checkpoint, shape_of(checkpoint.config, *numbers))
    assert proof.faults == ()
    assert proof.num_tensors == len(checkpoint.entries)
    assert proof.num_elements == checkpoint.num_parameters


@pytest.mark.parametrize("form", ["fp8", "int8-groups", "int4"])
def test_what_is_counted_is_what_the_readers_open(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of a linear's numbers and scales that readers map, one mark each, against the proof's ranges."""
    path = make_quantised(tmp_path, form, "maverick", linears=True, num_local_experts=4, **FOUR_RANKS)
    checkpoint = Checkpoint.open(path)
    shape = shape_of(checkpoint.config, 3, 2, 1, 2, 2)
    mapped: Counter[str] = Counter()
    matrix = Shard.matrix

    def counting(shard: Shard, entry: TensorEntry, block: Block) -> object:
        mapped[entry.name] += block.num_elements
        return matrix(shard, entry, block)

    monkeypatch.setattr(Shard, "matrix", counting)
    for host in shape.units:
        for run in shape.runs_of(checkpoint.config, host):
            checkpoint.expert(*run)
    for share in checkpoint.shares_of(shape.partition):
        weights = Weights(checkpoint, dtype=CPU["dtype"], device=CPU["device"], share=share)
        for name in checkpoint.quantised:
            layer = int(name.split(".")[2])
            if ".experts." not in name and layer in share.layers:
                weights.tensor(name)
    proved = {}
    monkeypatch.setattr("llama4_dist.checkpoint.coverage._first_fault", lambda one: proved.update({one.name: one}))
    coverage(checkpoint, shape)
    assert len(mapped) > 3 * 4 * 2
    for name, count in mapped.items():
        area = sum((one.bottom - one.top) * (one.right - one.left) for one in proved[name].rectangles)
        assert area == count, name


def test_a_missing_host_is_named_by_the_numbers_that_nobody_opens(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_quantised(tmp_path, "int4", "maverick", num_local_experts=4))
    shape = without(shape_of(checkpoint.config, 4, 3, 1, 1, 1), "expert-3")
    faults = coverage(checkpoint, shape).faults
    assert faults
    assert {fault.workers for fault in faults} == {()}
    assert any(fault.tensor.endswith("weight_packed") for fault in faults)
    assert any(fault.tensor.endswith("weight_scale") for fault in faults)


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_an_overlap_names_both_workers(form: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_quantised(tmp_path, form, "maverick", num_local_experts=4))
    shape = shape_of(checkpoint.config, 2, 3, 1, 1, 1)
    missing = next(unit for unit in shape.units["expert-0"] if unit not in shape.units["expert-1"])
    doubled = replace(shape, units=dict(shape.units) | {"expert-1": (*shape.units["expert-1"], missing)})
    faults = coverage(checkpoint, doubled).faults
    assert {fault.workers for fault in faults} == {("expert-0", "expert-1")}


def verify(*arguments: object) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(app, ["checkpoint", "verify", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_the_command_proves_a_quantised_checkpoint_and_places_a_fault_in_its_file(tmp_path: Path) -> None:
    path = make_quantised(tmp_path / "q", "int4", "maverick", linears=True, num_local_experts=4)
    plan = tmp_path / "plan.json"
    shape = ("--hosts", 3, "--slices", 3, "--stages", 2, "--tensor", 2)
    code, report = verify(path, *shape, "--save-plan", plan, "--deep")
    assert (code, report["faults"]) == (0, [])
    content = json.loads(plan.read_text())
    content["hosts"]["expert-1"] = content["hosts"]["expert-1"][1:]
    plan.write_text(json.dumps(content))
    code, report = verify(path, "--plan", plan)
    assert code == 1
    checkpoint = Checkpoint.open(path)
    for fault in report["faults"]:  # type: ignore[attr-defined]
        entry = checkpoint.entries[fault["tensor"]]
        start, stop = fault["bytes"]
        assert entry.start <= start < stop <= entry.stop


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (("--hosts", 3, "--slices", 4), "expert_slices=4 cuts groups"),
        (("--hosts", 3, "--tensor", 4), "num_ranks=4 cuts groups of model.layers.0"),
    ],
)
def test_a_shape_that_cuts_a_group_is_refused(shape: tuple[object, ...], message: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "int4", linears=True)
    code, report = verify(path, *shape)
    assert code == 2
    assert message in report["error"]["message"]  # type: ignore[index]
