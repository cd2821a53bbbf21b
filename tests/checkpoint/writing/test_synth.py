"""Synthetic checkpoints: other readers open them, their values depend on seed and name alone, holes take no disk."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Llama4ForCausalLM

from llama4_dist.checkpoint.presets import PRESETS
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.synthetic import read_origin
from llama4_dist.checkpoint.writing import moves, synth
from llama4_dist.checkpoint.writing.synth import SynthRequest, synthesise
from llama4_dist.errors import ConfigError
from tests.checkpoint.writing.models import FUSED, PER_EXPERT, narrow
from tests.plain_experts import plain

EXPERTS = "model.layers.1.feed_forward.experts."


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Read all shards with the safetensors library."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_transformers_loads_every_tensor_and_finds_clear_winners(tmp_path: Path) -> None:
    narrow(tmp_path / "model", shard_bytes=100_000)
    loaded: Any = Llama4ForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True, dtype=torch.float32)
    model, report = loaded
    assert not any(report.values()), report
    token_ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=token_ids).logits[0]
    best, second = logits.topk(2).values.unbind(-1)
    assert 1.0 < float(logits.std()) < 4.0
    assert float((best - second).median()) > 0.2
    assert len(logits.argmax(-1).unique()) > 20


@pytest.mark.parametrize("fields", [{"shard_bytes": 50_000}, {"layout": PER_EXPERT}], ids=["shards", "layout"])
def test_values_depend_neither_on_shards_nor_on_the_layout(
    tmp_path: Path, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(tmp_path / "one")
    monkeypatch.setattr(moves, "PIECE_BYTES", 5000)
    narrow(tmp_path / "other", **fields)
    one, other = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "other")
    for name in one.entries.keys() & other.entries.keys():
        assert torch.equal(one.tensor(name), other.tensor(name)), name
    for expert in range(4):
        ours, theirs = plain(one.expert(3, expert)), plain(other.expert(3, expert))
        assert torch.equal(ours.gate_DF, theirs.gate_DF)
        assert torch.equal(ours.up_DF, theirs.up_DF)
        assert torch.equal(ours.down_FD, theirs.down_FD)


def test_matrices_of_many_row_groups_are_drawn_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that do not begin where a group does give the same numbers."""
    from llama4_dist.checkpoint.writing import random_matrix

    monkeypatch.setattr(random_matrix, "GROUP_ELEMENTS", 70)
    matrix = random_matrix.RandomMatrix(name="a", seed=1, num_rows=11, row_length=20, mean=0.0, std=1.0, dtype="F32")
    whole = matrix.read(0, 11)
    assert all((matrix.read(first, last) == whole[first:last]).all() for first, last in [(0, 1), (2, 7), (4, 11)])
    assert len({row.tobytes() for row in whole}) == 11


def test_seeds_and_names_give_different_numbers_of_the_right_spread(tmp_path: Path) -> None:
    narrow(tmp_path / "a", seed=1)
    narrow(tmp_path / "b", seed=2)
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    for name, tensor in a.items():
        assert not torch.equal(tensor, b[name]), name
    assert not torch.equal(a["model.layers.0.self_attn.k_proj.weight"], a["model.layers.1.self_attn.k_proj.weight"])
    down, router = a[EXPERTS + "down_proj"], a["model.layers.1.feed_forward.router.weight"]
    assert float(down.std()) == pytest.approx(64**-0.5, rel=0.03)
    assert float(router.std()) == pytest.approx(2 * 48**-0.5, rel=0.2)
    assert float(a["model.norm.weight"].mean()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_hold_the_rounded_numbers(tmp_path: Path, dtype: str) -> None:
    narrow(tmp_path / "long")
    narrow(tmp_path / "short", dtype=dtype)
    long, short = stored(tmp_path / "long"), stored(tmp_path / "short")
    for name, tensor in long.items():
        assert torch.equal(short[name], tensor.to(getattr(torch, dtype))), name


def test_two_trillion_parameters_take_megabytes_and_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    report = synthesise(SynthRequest(preset="behemoth", is_sparse=True), tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert time.monotonic() - started < 5
    assert checkpoint.total_bytes == 2 * report.num_parameters > 3.9e12
    assert report.allocated_bytes < 20e6
    assert float(plain(checkpoint.expert(95, 15)).down_FD[-1].sum()) == 0.0
    with safe_open(tmp_path / "model" / "model-00001-of-00290.safetensors", "pt") as shard:
        assert shard.get_slice("model.embed_tokens.weight").get_shape() == [202048, 16384]


def test_a_hundred_and_twenty_eight_experts_stored_one_by_one_open_at_once(tmp_path: Path) -> None:
    synthesise(SynthRequest(preset="maverick", is_sparse=True, layout=PER_EXPERT), tmp_path / "model")
    started = time.monotonic()
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert time.monotonic() - started < 3
    assert checkpoint.num_parameters == 400_711_848_960


def test_chosen_tensors_hold_the_numbers_of_the_full_checkpoint_among_holes(tmp_path: Path) -> None:
    pattern = EXPERTS + "2.*"
    narrow(tmp_path / "full")
    report = narrow(tmp_path / "mixed", is_sparse=True, fill=("layers=0", pattern))
    full, mixed = stored(tmp_path / "full"), stored(tmp_path / "mixed")
    for name, tensor in mixed.items():
        if name.startswith("model.layers.0."):
            assert torch.equal(tensor, full[name]), name
        elif name.startswith(EXPERTS):
            assert torch.equal(tensor[2], full[name][2])
            assert not tensor[[0, 1, 3]].any()
        else:
            assert not tensor.any(), name
    assert report.origin.weights == "partly random"
    layer = 2 * 48 * 48 + 2 * 16 * 48 + 3 * 48 * 128 + 2 * 48
    assert report.filled_bytes == 4 * (layer + 3 * 48 * 64)


def test_a_narrow_model_keeps_depth_experts_and_head_ratio(tmp_path: Path) -> None:
    config = synthesise(SynthRequest(preset="behemoth", scale="1/64", is_sparse=True), tmp_path / "b").config
    assert (config.num_layers, config.num_experts, config.hidden_size) == (96, 16, 256)
    assert (config.expert_width, config.dense_width, config.vocab_size) == (376, 752, 3200)
    assert (config.head_dim, config.num_heads, config.num_kv_heads) == (16, 16, 1)
    assert config.num_heads * config.head_dim == config.hidden_size
    # Special tokens keep their distance from the vocabulary's end.
    full = PRESETS["behemoth"]
    assert config.vocab_size - config.eos_token_ids[0] == full["vocab_size"] - full["eos_token_id"][0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("divisor", [2, 4, 8, 16, 32, 64])
def test_every_member_can_be_made_narrower_by_powers_of_two(tmp_path: Path, preset: str, divisor: int) -> None:
    request = SynthRequest(preset=preset, scale=f"1/{divisor}", is_sparse=True)
    config = synthesise(request, tmp_path / "model").config
    assert config.hidden_size * divisor == PRESETS[preset]["hidden_size"]
    assert Checkpoint.open(tmp_path / "model").config == config


def test_config_json_says_that_it_is_synthetic(tmp_path: Path) -> None:
    narrow(tmp_path / "model", seed=7)
    origin = read_origin(tmp_path / "model")
    assert origin is not None
    assert (origin.preset, origin.weights, origin.seed) == ("scout", "random", 7)
    synthesise(SynthRequest(preset="behemoth", is_sparse=True), tmp_path / "behemoth")
    written = json.loads((tmp_path / "behemoth" / "config.json").read_text())
    assert "never published" in written["_llama4_dist"]["synthetic"]["geometry"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"preset": "giant"}, "'giant'.*behemoth"),
        ({"scale": "1/3"}, "hidden_size 5120"),
        ({"scale": "0.5"}, "'0.5'.*1/64"),
        ({"scale": "1/1280"}, "intermediate_size"),
        ({"overrides": ("num_layers=2",)}, "did you mean num_hidden_layers"),
        ({"overrides": ("num_hidden_layers",)}, "KEY=VALUE"),
        ({"overrides": ("num_key_value_heads=7",)}, "num_key_value_heads is 7"),
        ({"overrides": ('quantization_config={"a":1}',)}, "no KEY=VALUE"),
        ({"is_sparse": True, "fill": ("model.layers.48.*",)}, "model.layers.48"),
        ({"is_sparse": True, "fill": ("layers=48-50",)}, "layers=48-50"),
        ({"fill": ("layers=0",)}, "--sparse"),
    ],
)
def test_what_cannot_be_made_is_named_and_leaves_nothing(tmp_path: Path, fields: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        synthesise(SynthRequest(**({"preset": "scout"} | fields)), tmp_path / "model")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_strong_tensors_are_tensors_that_exist(tmp_path: Path) -> None:
    narrow(tmp_path / "model", is_sparse=True, layout=FUSED)
    names = Checkpoint.open(tmp_path / "model").entries
    assert all(any(name.endswith(strong) for name in names) for strong in synth.STRONG)
