"""The proof accepts what readers open, and names tensor, range and workers where a plan leaves or repeats something."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planning.placement import ExpertGeometry, HostSlot, place
from llama4_dist.checkpoint.cluster_shape import ClusterShape, check_shape, read_shape, shape_json
from llama4_dist.checkpoint.coverage import opened, prove_coverage
from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.presets import preset
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.rectangles import Rectangle, cells
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError
from llama4_dist.partition import Partition
from tests.checkpoints import make_checkpoint
from tests.plain_experts import plain

LAYOUTS = list(ExpertLayout)
# hosts, slices, replicas, stages, ranks
SHAPES = [(16, 1, 1, 1, 1), (32, 2, 1, 1, 1), (64, 4, 1, 1, 1), (16, 1, 2, 1, 1), (16, 1, 1, 4, 8), (48, 3, 2, 8, 16)]


def shape_of(config: ModelConfig, hosts: int, slices: int, replicas: int, stages: int, ranks: int) -> ClusterShape:
    geometry = ExpertGeometry(
        moe_layers=config.moe_layer_ids,
        num_experts=config.num_experts,
        expert_width=config.expert_width,
        expert_bytes=slices,
        num_slices=slices,
        slice_bytes=1,
    )
    slots = [HostSlot(host=f"expert-{number}", node=str(number)) for number in range(hosts)]
    placement = place(geometry, slots, num_replicas=replicas)
    units = {
        slot.host: tuple((layer, unit // slices, unit % slices) for layer, unit in placement.held_by(slot.host))
        for slot in slots
    }
    partition = Partition(num_stages=stages, num_ranks=ranks)
    return ClusterShape(num_slices=slices, num_replicas=replicas, partition=partition, units=units)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", SHAPES)
def test_two_trillion_parameters_are_opened_as_often_as_meant(
    layout: ExpertLayout, numbers: tuple[int, int, int, int, int]
) -> None:
    config = preset("behemoth")
    coverage = prove_coverage(config, layout, shape_of(config, *numbers))
    assert coverage.faults == ()
    assert coverage.num_elements == 1_991_729_233_920
    routed = sum(count for worker, count in coverage.elements_of.items() if worker.startswith("expert"))
    assert routed == numbers[2] * 96 * 16 * 3 * 16384 * 24064


@pytest.fixture(params=LAYOUTS)
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    make_checkpoint(tmp_path, "maverick", layout=request.param.value, num_local_experts=4)
    return Checkpoint.open(tmp_path)


def without(shape: ClusterShape, host: str) -> ClusterShape:
    return replace(shape, units={one: units for one, units in shape.units.items() if one != host})


def test_a_missing_host_is_named_by_what_nobody_opens(tiny: Checkpoint) -> None:
    shape = without(shape_of(tiny.config, 4, 2, 1, 1, 1), "expert-3")
    coverage = prove_coverage(tiny.config, tiny.layout, shape)
    lost = {fault.tensor for fault in coverage.faults}
    assert coverage.faults
    assert all(fault.workers == () and fault.num_intended == 1 for fault in coverage.faults)
    # The first fault of each tensor, found here by counting every element.
    for fault in coverage.faults:
        counts = counted(tiny, shape)[fault.tensor]
        block = counts[fault.rows.start : fault.rows.stop, fault.columns.start : fault.columns.stop]
        assert (block == 0).all()
    assert lost == {name for name, counts in counted(tiny, shape).items() if (counts == 0).any()}


def test_a_lost_replica_names_the_one_that_is_left(tiny: Checkpoint) -> None:
    shape = without(shape_of(tiny.config, 3, 1, 2, 1, 1), "expert-0")
    faults = prove_coverage(tiny.config, tiny.layout, shape).faults
    assert {fault.workers for fault in faults} <= {("expert-1",), ("expert-2",)}
    assert {fault.num_intended for fault in faults} == {2}


def test_an_overlap_names_both_workers(tiny: Checkpoint) -> None:
    shape = shape_of(tiny.config, 2, 2, 1, 1, 1)
    extra = shape.units["expert-0"][0]
    layer, expert, _ = extra
    doubled = replace(shape, units=dict(shape.units) | {"expert-1": (*shape.units["expert-1"], extra)})
    (*_, fault) = prove_coverage(tiny.config, tiny.layout, doubled).faults
    assert fault.workers == ("expert-0", "expert-1")
    assert f"layers.{layer}." in fault.tensor
    if tiny.layout is ExpertLayout.FUSED:
        assert fault.rows.start // (tiny.config.expert_width if "down" in fault.tensor else 64) == expert


def counted(checkpoint: Checkpoint, shape: ClusterShape) -> dict[str, np.ndarray]:
    """Count by one mark per element, the slow and obvious way."""
    counts = {}
    for name, entry in checkpoint.entries.items():
        counts[name] = np.zeros(entry.num_elements, dtype=np.int32)
    for _, name, block in opened(checkpoint.config, checkpoint.layout, shape):
        for row in block.each_row():
            counts[name][row.start : row.stop] += 1
    return {name: flat.reshape(-1, checkpoint.entries[name].shape[-1]) for name, flat in counts.items()}


def test_the_ranges_are_those_the_reader_maps(tiny: Checkpoint) -> None:
    """What the reader hands out for a slice lies at the addresses that the proof counts."""
    shape = shape_of(tiny.config, 3, 2, 1, 1, 1)
    for host in shape.units:
        for layer, expert, start, stop in shape.runs_of(tiny.config, host):
            weights = plain(tiny.expert(layer, expert, start, stop))
            mapped = torch.cat([one.sort().values for one in (weights.gate_DF.flatten(), weights.up_DF.flatten())])
            marked = [
                tiny.tensor(name).flatten()[row.start : row.stop]
                for worker, name, block in opened(tiny.config, tiny.layout, shape)
                if worker == host and f"layers.{layer}." in name and "down" not in name
                and contains(tiny, name, block.start, expert)
                for row in block.each_row()
            ]  # fmt: skip
            assert torch.equal(mapped.sort().values, torch.cat(marked).sort().values)


def contains(checkpoint: Checkpoint, name: str, start: int, expert: int) -> bool:
    if checkpoint.layout is ExpertLayout.PER_EXPERT:
        return f".experts.{expert}." in name
    return start // (64 * 2 * checkpoint.config.expert_width) == expert


@pytest.mark.parametrize("preset_name", ["scout", "topk2", "dense", "maverick"])
@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 2), (4, 4), (1, 4)])
def test_each_element_is_counted_as_the_intention_says(
    tmp_path: Path, preset_name: str, stages: int, ranks: int
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, preset_name))
    numbers = (2, 2, 1, stages, ranks)
    partition = Partition(num_stages=stages, num_ranks=ranks)
    shape = ClusterShape(num_slices=1, num_replicas=1, partition=partition, units={})
    if checkpoint.config.moe_layer_ids:
        shape = shape_of(checkpoint.config, *numbers)
    assert prove_coverage(checkpoint.config, checkpoint.layout, shape).faults == ()
    for name, counts in counted(checkpoint, shape).items():
        heads = checkpoint.config.num_kv_heads
        whole_on_each_rank = "norm" in name or "router" in name
        shared = ranks // heads if name.endswith(("k_proj.weight", "v_proj.weight")) and ranks > heads else 1
        tied = 2 if preset_name == "dense" and stages > 1 and "embed" in name else 1
        assert (counts == (ranks if whole_on_each_rank else shared * tied)).all(), name


rectangles = st.builds(
    lambda top, left, height, width, worker: Rectangle(top, top + height, left, left + width, worker),
    st.integers(0, 7), st.integers(0, 7), st.integers(1, 8), st.integers(1, 8), st.sampled_from("abc"),
)  # fmt: skip


@given(st.lists(rectangles, max_size=6))
@settings(max_examples=200, deadline=None)
def test_cells_are_every_element_once_with_all_its_workers(laid: list[Rectangle]) -> None:
    seen: dict[tuple[int, int], list[str]] = {}
    for cell in cells(Rectangle(0, 8, 0, 8, ""), laid):
        for place_ in ((row, column) for row in cell.rows for column in cell.columns):
            assert place_ not in seen
            seen[place_] = sorted(cell.workers)
    for row, column in np.ndindex(8, 8):
        over = [one.worker for one in laid if one.top <= row < one.bottom and one.left <= column < one.right]
        assert seen[row, column] == sorted(over)


def broken_plans() -> Iterator[tuple[object, str]]:
    good = {"format": 1, "num_slices": 2, "num_replicas": 1, "hosts": {"a": [[1, 0, 0]]}}
    yield {}, "format is missing"
    yield good | {"hosts": [1]}, "hosts is"
    yield good | {"hosts": {"a": [[1, 0]]}}, "hosts.'a' is no list"
    yield good | {"hosts": {"a": [[1, 0, True]]}}, "hosts.'a' is no list"
    yield good | {"num_slices": 0}, "num_slices is 0"
    yield good | {"num_stages": 10**9}, "num_stages"


@pytest.mark.parametrize(("content", "cause"), broken_plans())
def test_a_plan_file_that_is_wrong_is_refused_by_name(tmp_path: Path, content: object, cause: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=cause):
        read_shape(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"units": {"a": ((0, 0, 0),)}}, "a slice 0 of expert 0 in layer 0"),
        ({"units": {"a": ((1, 4, 0),)}}, "expert 4"),
        ({"units": {"a": ((1, 0, 2),)}}, "slice 2"),
        ({"num_slices": 1000}, "1000"),
        ({"partition": Partition(num_ranks=3)}, "num_ranks=3"),
        ({"partition": Partition(num_stages=5)}, "num_stages=5"),
    ],
)
def test_a_plan_that_the_model_cannot_have_is_refused(tiny: Checkpoint, change: dict[str, object], cause: str) -> None:
    shape = replace(shape_of(tiny.config, 2, 2, 1, 1, 1), **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=cause):
        check_shape(tiny.config, shape)


def test_a_plan_file_says_what_it_was_written_from(tiny: Checkpoint, tmp_path: Path) -> None:
    shape = shape_of(tiny.config, 3, 2, 2, 2, 2)
    (tmp_path / "plan.json").write_text(shape_json(shape))
    assert read_shape(tmp_path / "plan.json") == shape
