import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.checkpoint.config_file import parse_config, read_config
from llama4_dist.config import ModelConfig, RopeScaling
from llama4_dist.errors import CheckpointError
from tests.checkpoint.published import MAVERICK, SCOUT, SMALL_DENSE
from tests.checkpoints import config_json
from tests.presets import BASE, LLAMA3_SCALING, PRESETS

SCALING = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position=8192)


def parse(content: Any) -> ModelConfig:
    return parse_config(json.dumps(content).encode())


def preset_json(preset: str, **overrides: Any) -> dict[str, Any]:
    return config_json(preset, BASE | PRESETS[preset] | overrides, torch.float32)


def test_the_published_scout_config_is_read_as_published() -> None:
    config = parse(SCOUT)
    assert config.architecture == "Llama4ForConditionalGeneration"
    assert config.dtype == "bfloat16"
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (5120, 48, 40, 8)
    assert (config.head_dim, config.expert_width, config.dense_width) == (128, 8192, 16384)
    assert (config.num_experts, config.experts_per_token, config.vocab_size) == (16, 1, 202048)
    assert [layer for layer, rope in enumerate(config.rope_layers) if not rope] == list(range(3, 48, 4))
    assert config.chunked_layers == config.rope_layers
    assert config.moe_layer_ids == tuple(range(48))
    assert (config.chunk_size, config.use_qk_norm, config.tie_word_embeddings) == (8192, True, False)
    assert (config.temperature_tuning, config.floor_scale, config.attn_scale) == (True, 8192.0, 0.1)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, SCALING)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (
        200000,
        (200001, 200007, 200008),
        200018,
    )
    assert config.has_vision


def test_the_published_maverick_config_is_read_as_published() -> None:
    config = parse(MAVERICK)
    assert config.moe_layer_ids == tuple(range(1, 48, 2))
    assert (config.num_experts, config.use_qk_norm, config.rope_scaling) == (128, False, None)
    assert config.max_position_embeddings == 1048576


def test_a_small_dense_config_has_no_experts_and_no_nope_layer() -> None:
    config = parse(SMALL_DENSE)
    assert config.moe_layer_ids == ()
    assert (config.num_experts, config.experts_per_token) == (0, 0)
    assert all(config.rope_layers)
    assert not any(config.chunked_layers)
    assert not config.temperature_tuning


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_reads_every_preset_to_the_same_geometry(preset: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(preset_json(preset)))
    ours, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert ours.rope_layers == tuple(map(bool, theirs.no_rope_layers))
    assert ours.chunked_layers == tuple(kind == "chunked_attention" for kind in theirs.layer_types)
    assert ours.moe_layer_ids == tuple(theirs.moe_layers)
    assert (ours.hidden_size, ours.head_dim) == (theirs.hidden_size, theirs.head_dim)
    assert (ours.num_experts, ours.experts_per_token) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")
    assert (ours.bos_token_id, list(ours.eos_token_ids)) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.temperature_tuning, ours.floor_scale) == (theirs.attn_temperature_tuning, theirs.floor_scale)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_what_transformers_5_writes_says_the_same_as_the_v4_file(nested: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig

    original = preset_json("conditional" if nested else "scout")
    (tmp_path / "config.json").write_text(json.dumps(original))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "v5")
    rewritten = json.loads((tmp_path / "v5" / "config.json").read_text())
    assert "rope_parameters" in (rewritten["text_config"] if nested else rewritten)
    assert parse(rewritten) == parse(original)


def test_end_tokens_may_stand_at_the_top_level() -> None:
    content = preset_json("conditional")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype"):
        content[key] = content["text_config"].pop(key)
    assert parse(content) == parse(preset_json("conditional"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_ids": (7,)}),
        ({"bos_token_id": None, "pad_token_id": None}, {"bos_token_id": None, "pad_token_id": None}),
        ({"attn_temperature_tuning": 4}, {"temperature_tuning": True}),
        ({"attn_temperature_tuning": 0}, {"temperature_tuning": False}),
        ({"head_dim": None}, {"head_dim": 16}),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, {"rope_layers": (True, False, True, False)}),
        ({"layer_types": ["full_attention"] * 4, "attention_chunk_size": None}, {"chunk_size": None}),
        ({"rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
        ({"interleave_moe_layer_step": 3}, {"moe_layers": (False, False, True, False)}),
    ],
)
def test_each_spelling_is_understood(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = parse(preset_json("scout", **changes))
    assert {name: getattr(config, name) for name in expected} == expected


def test_old_scout_scaling_is_read_but_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse(SCOUT).rope_scaling == SCALING
        assert not caplog.records
        old = SCOUT["text_config"]["rope_scaling"] | {"factor": 8.0, "high_freq_factor": 4.0}
        config = parse(SCOUT | {"text_config": SCOUT["text_config"] | {"rope_scaling": old}})
    assert config.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    assert "scout_rope_scaling_outdated" in caplog.text


REQUIRED = [
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok", "interleave_moe_layer_step", "vocab_size",
    "use_qk_norm", "rope_theta", "attention_chunk_size", "max_position_embeddings", "rms_norm_eps", "eos_token_id",
    "torch_dtype", "architectures",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_no_default_stands_in_for_a_missing_key(key: str) -> None:
    content = preset_json("scout")
    del content[key]
    refused(content, key)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_local_experts", 0),
        ("num_local_experts", 10**9),
        ("num_experts_per_tok", 17),
        ("num_experts_per_tok", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("num_key_value_heads", 0),
        ("num_attention_heads", -4),
        ("num_attention_heads", True),
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", 10**400),
        ("head_dim", 15),
        ("head_dim", 0),
        ("num_hidden_layers", 10**6),
        ("max_position_embeddings", -1),
        ("attention_chunk_size", 0),
        ("attention_chunk_size", None),
        ("vocab_size", 10**9),
        ("bos_token_id", 10**9),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", -1.0),
        ("rope_theta", 10**400),
        ("rope_scaling", LLAMA3_SCALING | {"rope_type": "yarn"}),
        ("rope_scaling", LLAMA3_SCALING | {"high_freq_factor": 0.5}),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("rope_scaling", "llama3"),
        ("rope_parameters", {"rope_type": "default"}),
        ("no_rope_layers", [1, 1, 1]),
        ("no_rope_layers", [1, 1, 1, 2]),
        ("no_rope_layer_interval", 0),
        ("layer_types", ["chunked_attention"] * 3),
        ("layer_types", ["sliding_attention"] * 4),
        ("layer_types", [["x"]] * 4),
        ("moe_layers", [4]),
        ("moe_layers", [-1]),
        ("moe_layers", [1, 1]),
        ("interleave_moe_layer_step", 0),
        ("eos_token_id", -1),
        ("eos_token_id", [320]),
        ("eos_token_id", "eos"),
        ("bos_token_id", 320),
        ("pad_token_id", -1),
        ("attn_temperature_tuning", "yes"),
        ("floor_scale", 0),
        ("use_qk_norm", 1),
        ("tie_word_embeddings", "no"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("torch_dtype", "int8"),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.Model"}),
    ],
)
def test_c21_a_wrong_value_is_refused_by_its_key(key: str, value: object, nested: bool) -> None:
    content = preset_json("conditional" if nested else "scout")
    (content["text_config"] if nested else content)[key] = value
    refused(content, key)


def test_heads_that_do_not_divide_the_width_need_a_head_dim() -> None:
    refused(preset_json("scout", num_attention_heads=6, head_dim=None), "head_dim")


@pytest.mark.parametrize(
    "named", [["LlamaForCausalLM"], [], "Llama4ForCausalLM", ["Llama4ForCausalLM"] * 2, [["x"]], None]
)
def test_c21_another_architecture_is_refused(named: object) -> None:
    refused(preset_json("scout") | {"architectures": named}, "architectures")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": 1, "a": 1}', b"\xff\xfe{}", b"[" * 10_000])
def test_c21_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(raw)
    assert caught.value.file == "config.json"


def test_c21_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        read_config(tmp_path)


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
hostile: st.SearchStrategy[Any] = st.one_of(
    scalars, st.lists(scalars, max_size=5), st.dictionaries(st.text(max_size=4), scalars, max_size=2)
)


@given(
    key=st.sampled_from([*BASE, "architectures", "moe_layers", "layer_types", "rope_parameters", "text_config"]),
    value=hostile,
)
def test_no_value_does_anything_but_parse_or_raise_checkpoint_error(key: str, value: object) -> None:
    try:
        config = parse(preset_json("scout") | {key: value})
    except CheckpointError as error:
        message = error.message
    else:
        assert len(config.rope_layers) == len(config.chunked_layers) == len(config.moe_layers) == config.num_layers
        return
    assert "\n" not in message
    assert len(message) < 500


def refused(content: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        parse(content)
    assert caught.value.file == "config.json"
    assert caught.value.message.startswith("config.json: ")
