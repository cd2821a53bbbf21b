"""The tiny checkpoints are what they claim: transformers loads them, and each feature of theirs moves the logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

from tests.checkpoints import make_checkpoint
from tests.presets import PRESETS

NUM_TOKENS = 100


def logits_TV(path: Path, preset: str) -> torch.Tensor:
    architecture = Llama4ForConditionalGeneration if preset == "conditional" else Llama4ForCausalLM
    loaded: Any = architecture.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    model, report = loaded
    assert not any(report.values()), report
    token_ids = torch.randint(0, 256, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=token_ids).logits[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_loads_every_tensor_and_finds_spread_logits(tmp_path: Path, preset: str) -> None:
    logits = logits_TV(make_checkpoint(tmp_path, preset), preset)
    best, second = logits.topk(2).values.unbind(-1)
    assert 1.0 < float(logits.std()) < 4.0
    assert float((best - second).median()) > 0.2  # greedy tokens are no coin tosses
    assert len(logits.argmax(-1).unique()) > 30


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("scout", {"attention_chunk_size": 1024}),
        ("scout", {"attn_temperature_tuning": False}),
        ("scout", {"use_qk_norm": False}),
        ("scout", {"no_rope_layers": [1, 1, 1, 1]}),
        ("scout", {"rope_scaling": None}),
        ("scout", {"floor_scale": 16}),
        ("maverick", {"use_qk_norm": True}),
        ("topk2", {"num_experts_per_tok": 1}),
        ("dense", {"rope_theta": 1e6}),
    ],
    ids=str,
)
def test_every_feature_moves_the_logits(tmp_path: Path, preset: str, changes: dict[str, Any]) -> None:
    with_it = logits_TV(make_checkpoint(tmp_path / "with", preset), preset)
    without = logits_TV(make_checkpoint(tmp_path / "without", preset, **changes), preset)
    assert float((with_it - without)[-1].abs().max()) > 0.1


def test_layouts_shards_and_nesting_hold_the_same_numbers(tmp_path: Path) -> None:
    def stored(name: str, preset: str = "scout", **how: Any) -> dict[str, torch.Tensor]:
        path = make_checkpoint(tmp_path / name, preset, **how)
        tensors = {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
        return {key.removeprefix("language_model."): value for key, value in tensors.items()}

    reference, split = stored("reference"), stored("split", layout="per_expert")
    prefix = "model.layers.2.feed_forward.experts."
    gate_D2F = reference[f"{prefix}gate_up_proj"][5]
    assert torch.equal(split[f"{prefix}5.gate_proj.weight"], gate_D2F[:, :96].T)
    assert torch.equal(split[f"{prefix}5.up_proj.weight"], gate_D2F[:, 96:].T)
    assert torch.equal(split[f"{prefix}5.down_proj.weight"], reference[f"{prefix}down_proj"][5].T)
    for other in (stored("one", num_shards=1), stored("nested", "conditional")):
        assert all(torch.equal(other[name], tensor) for name, tensor in reference.items())
    assert not torch.equal(stored("seed", seed=1)["lm_head.weight"], reference["lm_head.weight"])
