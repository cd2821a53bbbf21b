"""A part holds exactly what its worker opens, reads as the whole does, and goes by the whole's hash."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama4_dist.checkpoint.cluster_shape import ClusterShape
from llama4_dist.checkpoint.describe import describe
from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.part import PART
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.writing import moves
from llama4_dist.checkpoint.writing.parts import plan_parts, plan_whole, write_parts
from llama4_dist.errors import CheckpointError, ConfigError, UnavailableError
from llama4_dist.model.expert_store import ExpertStore
from llama4_dist.partition import Partition
from tests.checkpoint.writing.models import FUSED, PER_EXPERT, narrow
from tests.checkpoints import make_checkpoint
from tests.tokenizers_tiny import make_tokenizer

# Layers 1 and 3 have four experts of 64 columns, here in two slices of 32.
UNITS = {
    "expert-0": ((1, 0, 0), (1, 0, 1), (3, 1, 1)),
    "expert-1": (*((layer, expert, 0) for layer in (1, 3) for expert in (1, 2, 3)), (3, 0, 0), (3, 0, 1)),
    "expert-2": (*((layer, expert, 1) for layer in (1, 3) for expert in (2, 3)), (1, 1, 1)),
    "idle": (),
}
SHAPE = ClusterShape(num_slices=2, num_replicas=1, partition=Partition(), units=UNITS)
STAGED = ClusterShape(num_slices=2, num_replicas=1, partition=Partition(num_stages=2), units=UNITS)


@pytest.fixture(params=[FUSED, PER_EXPERT])
def layout(request: pytest.FixtureRequest) -> ExpertLayout:
    return ExpertLayout(request.param)


@pytest.fixture
def whole(tmp_path: Path, layout: ExpertLayout) -> Checkpoint:
    narrow(tmp_path / "whole", layout=layout, shard_bytes=80_000)
    return Checkpoint.open(tmp_path / "whole")


def cut(whole: Checkpoint, out: Path, shape: ClusterShape = SHAPE) -> dict[str, Checkpoint]:
    written = write_parts(whole, plan_parts(whole, shape), out, shard_bytes=10_000)
    return {part.name: Checkpoint.open(out / part.name) for part in written}


def assert_same_slice(part: Checkpoint, whole: Checkpoint, layer: int, expert: int, start: int, stop: int) -> None:
    ours, theirs = part.expert(layer, expert, start, stop), whole.expert(layer, expert, start, stop)
    for one in ("gate_DF", "up_DF", "down_FD"):
        assert torch.equal(getattr(ours, one), getattr(theirs, one)), (layer, expert, one)


def test_every_slice_is_in_its_part_and_equals_the_whole(
    whole: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "PIECE_BYTES", 1000)
    parts = cut(whole, tmp_path / "parts")
    for host, units in UNITS.items():
        for layer, expert, number in units:
            assert_same_slice(parts[host], whole, layer, expert, 32 * number, 32 * number + 32)
    assert set(parts) == {"expert-0", "expert-1", "expert-2", "attention"}


def test_slices_that_follow_each_other_are_one_run_and_may_be_read_across(whole: Checkpoint, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "parts")["expert-1"]
    assert_same_slice(part, whole, 3, 0, 0, 64)
    assert_same_slice(part, whole, 3, 0, 17, 49)


def test_parts_together_are_the_whole_once(whole: Checkpoint, tmp_path: Path) -> None:
    parts = cut(whole, tmp_path / "parts")
    assert sum(part.num_parameters for part in parts.values()) == whole.num_parameters


def test_all_parts_go_by_the_hash_of_the_whole(whole: Checkpoint, tmp_path: Path) -> None:
    parts = cut(whole, tmp_path / "parts")
    assert {part.model_hash for part in parts.values()} == {whole.model_hash}
    assert describe(parts["expert-0"]).part == "expert-0"


def test_what_is_elsewhere_is_an_error_only_when_it_is_asked_for(whole: Checkpoint, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "parts")["expert-0"]
    with pytest.raises(UnavailableError, match=r"expert 2 of layer 1, columns 0 to 64 is not in .*expert-0") as caught:
        part.expert(1, 2)
    assert caught.value.reason == "NOT_IN_PART"
    with pytest.raises(UnavailableError, match=r"expert 1 of layer 3, columns 0 to 64"):
        part.expert(3, 1)  # only its second half is here
    with pytest.raises(UnavailableError, match=r"model\.norm\.weight is not in"):
        part.tensor("model.norm.weight")


def test_the_attention_side_has_all_but_routed_experts_by_stage(whole: Checkpoint, tmp_path: Path) -> None:
    parts = cut(whole, tmp_path / "parts", STAGED)
    first, last = parts["attention-0"], parts["attention-1"]
    for name in whole.entries:
        if ".experts." in name:
            continue
        late = name in ("model.norm.weight", "lm_head.weight") or name.startswith(
            ("model.layers.2.", "model.layers.3.")
        )
        holder, other = (last, first) if late else (first, last)
        assert torch.equal(holder.tensor(name), whole.tensor(name)), name
        with pytest.raises(UnavailableError):
            other.tensor(name)


def test_an_expert_host_computes_the_same_bits_from_its_part(tmp_path: Path) -> None:
    narrow(tmp_path / "whole")
    whole = Checkpoint.open(tmp_path / "whole")
    part = cut(whole, tmp_path / "parts")["expert-1"]
    stores = [ExpertStore(one, dtype=torch.float32, device="cpu") for one in (whole, part)]
    for store in stores:
        store.add([(3, 0)])
    assert stores[0].fingerprint((3, 0)) == stores[1].fingerprint((3, 0))
    with pytest.raises(UnavailableError):
        stores[1].adopt([(1, 3)])
    stores[1].remove([(3, 0)])
    assert stores[1].holds == frozenset()


def test_other_shards_hold_the_same_tensors_under_the_same_hash(whole: Checkpoint, tmp_path: Path) -> None:
    write_parts(whole, [plan_whole(whole)], tmp_path / "copy", shard_bytes=30_000)
    copy = Checkpoint.open(tmp_path / "copy")
    assert copy.model_hash == whole.model_hash
    assert copy.num_shards > whole.num_shards
    for name in whole.entries:
        assert torch.equal(copy.tensor(name), whole.tensor(name)), name
    parts = cut(copy, tmp_path / "parts")  # a whole in other shards is a whole
    assert_same_slice(parts["expert-0"], whole, 1, 0, 0, 64)


def test_vision_tensors_and_the_tokenizer_come_along(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "whole", "conditional")
    make_tokenizer(path)
    whole = Checkpoint.open(path)
    write_parts(whole, [plan_whole(whole)], tmp_path / "copy", shard_bytes=10**9)
    stored = load_file(tmp_path / "copy" / "model.safetensors")
    originals = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert stored.keys() == originals.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in originals.items())
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()


def test_holes_stay_holes(tmp_path: Path, layout: ExpertLayout) -> None:
    """Two layers of Behemoth's size, 84 GB long."""
    wide = ("hidden_size=16384", "intermediate_size=24064", "num_local_experts=16", "num_hidden_layers=2")
    narrow(tmp_path / "whole", *wide, is_sparse=True, layout=layout, fill=("*.layers.0.*norm*",))
    whole = Checkpoint.open(tmp_path / "whole")
    units = {"a": tuple((1, expert, 0) for expert in range(16)), "b": tuple((1, expert, 1) for expert in range(16))}
    shape = ClusterShape(num_slices=2, num_replicas=1, partition=Partition(), units=units)
    written = write_parts(whole, plan_parts(whole, shape), tmp_path / "parts", shard_bytes=10**10)
    assert sum(part.num_bytes for part in written) == whole.total_bytes > 70e9
    assert sum(part.allocated_bytes for part in written) < 2e6
    attention = Checkpoint.open(tmp_path / "parts" / "attention")
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(attention.tensor(name), whole.tensor(name))
    assert whole.tensor(name).any()


def test_a_part_is_not_cut_again(whole: Checkpoint, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "parts")["expert-0"]
    with pytest.raises(ConfigError, match="cut parts from the whole"):
        plan_parts(part, SHAPE)
    with pytest.raises(ConfigError, match="cut parts from the whole"):
        plan_whole(part)


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("model_hash", "0", "64 hexadecimal digits"),
        ("config_hash", "0" * 64, "another config.json"),
        ("layout", "other", "fused or per_expert"),
        ("format", 2, "format"),
        ("tensors", ["model.layers.9.x"], "does not have"),
        ("tensors", "all", "list of names"),
        ("experts", [[1, 0, 0]], "layer, expert, start, stop"),
        ("experts", [[0, 0, 0, 64]], "does not have"),
        ("experts", [[1, 0, 0, 65]], "does not have"),
        ("experts", [[1, 3, 0, 64]], "is missing"),
        ("experts", 5, "a list"),
        ("label", 5, "a string"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, key: str, value: Any, cause: str) -> None:
    narrow(tmp_path / "whole")
    cut(Checkpoint.open(tmp_path / "whole"), tmp_path / "parts")
    manifest = tmp_path / "parts" / "expert-0" / PART
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=cause):
        Checkpoint.open(manifest.parent)


def test_a_part_that_lost_a_tensor_is_refused(tmp_path: Path) -> None:
    narrow(tmp_path / "whole")
    cut(Checkpoint.open(tmp_path / "whole"), tmp_path / "parts")
    index = tmp_path / "parts" / "expert-0" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][next(iter(content["weight_map"]))]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint.open(index.parent)
