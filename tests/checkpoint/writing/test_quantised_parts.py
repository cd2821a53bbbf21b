"""Parts of a quantised checkpoint read and compute as the whole does; what would cut a word is refused."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llama4_dist.checkpoint.cluster_shape import ClusterShape
from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.checkpoint.quantising.run import quantise_checkpoint
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import Number, Scheme
from llama4_dist.checkpoint.writing.convert import to_layout, to_meta
from llama4_dist.checkpoint.writing.parts import plan_parts, plan_whole, write_parts
from llama4_dist.cli.app import app
from llama4_dist.errors import CheckpointError, ConfigError, UnavailableError
from llama4_dist.model.expert_store import ExpertStore
from llama4_dist.partition import Partition
from tests.checkpoint.test_coverage import shape_of
from tests.checkpoints import make_checkpoint
from tests.model.test_quantised_store import CPU
from tests.quantised_checkpoints import ALL, make_quantised

FORMS = [*ALL, "int8-plain"]


def cut(whole: Checkpoint, out: Path, shape: ClusterShape) -> dict[str, Checkpoint]:
    written = write_parts(whole, plan_parts(whole, shape), out, shard_bytes=10_000)
    return {part.name: Checkpoint.open(out / part.name) for part in written}


def same(ours: object, theirs: object) -> bool:
    assert isinstance(ours, QuantisedExpertWeights)
    assert isinstance(theirs, QuantisedExpertWeights)
    pairs = [(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours)]
    return all(torch.equal(one.dequantise(), other.dequantise()) for one, other in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_every_slice_is_in_its_part_and_equals_the_whole(form: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path / "whole", form, "maverick", linears=True, num_local_experts=4)
    whole = Checkpoint.open(path)
    shape = shape_of(whole.config, 3, 3, 1, 2, 1)
    parts = cut(whole, tmp_path / "parts", shape)
    assert set(parts) == {*shape.units, "attention-0", "attention-1"}
    assert {part.model_hash for part in parts.values()} == {whole.model_hash}
    assert sum(part.num_parameters for part in parts.values()) == whole.num_parameters
    for host, units in shape.units.items():
        parts[host].verify()
        for layer, expert, number in units:
            columns = (32 * number, 32 * number + 32)
            assert same(parts[host].expert(layer, expert, *columns), whole.expert(layer, expert, *columns))
    for share, part in zip(whole.shares_of(shape.partition), (parts["attention-0"], parts["attention-1"]), strict=True):
        part.verify()
        for name in whole.quantised:
            if ".experts." not in name and int(name.split(".")[2]) in share.layers:
                assert torch.equal(part.tensor(name), whole.tensor(name))


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_host_computes_the_same_bits_from_its_part(form: str, tmp_path: Path) -> None:
    whole = Checkpoint.open(make_quantised(tmp_path / "whole", form, "maverick", num_local_experts=4))
    shape = shape_of(whole.config, 2, 3, 1, 1, 1)
    part = cut(whole, tmp_path / "parts", shape)["expert-0"]
    layer, expert, number = shape.units["expert-0"][0]
    pair = (layer, 3 * expert + number)
    stores = [ExpertStore(one, num_slices=3, residency_bytes=50_000, **CPU) for one in (whole, part)]
    for store in stores:
        store.add([pair])
    assert stores[0].fingerprint(pair) == stores[1].fingerprint(pair)
    missing = next(unit for unit in shape.units["expert-1"] if unit not in shape.units["expert-0"])
    with pytest.raises(UnavailableError, match="is not in"):
        stores[1].adopt([(missing[0], 3 * missing[1] + missing[2])])


def test_a_whole_in_other_shards_is_the_same(tmp_path: Path) -> None:
    whole = Checkpoint.open(make_quantised(tmp_path / "whole", "int4", "maverick", num_local_experts=4))
    write_parts(whole, [plan_whole(whole)], tmp_path / "copy", shard_bytes=30_000)
    copy = Checkpoint.open(tmp_path / "copy")
    assert (copy.model_hash, copy.num_parameters) == (whole.model_hash, whole.num_parameters)
    assert copy.num_shards > whole.num_shards
    assert same(copy.expert(1, 2), whole.expert(1, 2))


def test_a_part_whose_expert_lost_a_scale_is_damaged(tmp_path: Path) -> None:
    whole = Checkpoint.open(make_quantised(tmp_path / "whole", "fp8", "maverick", num_local_experts=4))
    cut(whole, tmp_path / "parts", shape_of(whole.config, 2, 1, 1, 1, 1))
    part = tmp_path / "parts" / "expert-0"
    for file in part.glob("*.safetensors"):
        raw = file.read_bytes()
        file.write_bytes(raw.replace(b"up_proj.weight.0-96_scale", b"up_proj.weight.0-96_skale"))
    for file in part.glob("*.index.json"):
        file.write_text(file.read_text().replace("up_proj.weight.0-96_scale", "up_proj.weight.0-96_skale"))
    with pytest.raises(CheckpointError, match="up_proj"):
        Checkpoint.open(part)


def test_a_cut_through_a_word_of_packed_numbers_is_refused(tmp_path: Path) -> None:
    """Twelve numbers of four bits are whole bytes, which a host reads, but no whole words, which a part would need."""
    path = make_quantised(tmp_path, "int4-channel", "maverick", num_local_experts=2, intermediate_size=84)
    checkpoint = Checkpoint.open(path)
    shape = ClusterShape(num_slices=7, num_replicas=1, partition=Partition(), units={"a": ((1, 0, 1),)})
    with pytest.raises(ConfigError, match="cut a word of 8 packed numbers: take slices that begin and end at"):
        plan_parts(checkpoint, shape)


def test_layouts_of_quantised_checkpoints_are_not_converted(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "fp8")
    for convert in (lambda: to_layout(path, ExpertLayout.FUSED), lambda: to_meta(path)):
        with pytest.raises(ConfigError, match=r"is quantised .*: convert the checkpoint that it was made of"):
            convert()
    result = CliRunner().invoke(app, ["checkpoint", "convert", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_part_is_not_quantised_and_a_whole_in_other_shards_is(tmp_path: Path) -> None:
    """The manifest of the whole names its layout and its hash, which are not those of what is made of it."""
    whole = Checkpoint.open(make_checkpoint(tmp_path / "whole", "maverick", num_local_experts=4))
    scheme = Scheme(number=Number.INT8)
    shape = ClusterShape(num_slices=1, num_replicas=1, partition=Partition(), units={"a": ((1, 0, 0),)})
    write_parts(whole, plan_parts(whole, shape), tmp_path / "parts", shard_bytes=10**9)
    with pytest.raises(ConfigError, match="a part of a checkpoint: quantise the whole"):
        quantise_checkpoint(tmp_path / "parts" / "a", tmp_path / "bad", scheme)
    write_parts(whole, [plan_whole(whole)], tmp_path / "copy", shard_bytes=30_000)
    quantise_checkpoint(tmp_path / "copy", tmp_path / "out", scheme)
    made = Checkpoint.open(tmp_path / "out")
    assert made.part is None
    assert made.model_hash != whole.model_hash
