"""Checks models/llama4-mini as it lies in the repository: size, config, tokenizer, routing and what it scores."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_bundled_model.export import config_of, generation_config_of
from tools.train_bundled_model.model import Geometry, MiniLlama4
from tools.train_bundled_model.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

FOLDER = Path(__file__).parents[2] / "models" / "llama4-mini"
MAX_BYTES = 32_000_000
TEXTS = ("Call me Ishmael.", "two  blanks\n\nand a line", "naïve – 北京 🐋", "in 1851, $3.50!", "<|eot|", "", " x")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return read_json("reference.json")


@pytest.fixture(scope="module")
def model() -> MiniLlama4:
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(read_json("model.safetensors.index.json")["weight_map"].values())):
        weights |= load_file(FOLDER / shard)
    model = MiniLlama4(Geometry())
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def read_json(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_folder_stays_under_its_size_limit() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_config_says_everything_and_what_the_exporter_says(tokens: Tokenizer) -> None:
    assert read_json("config.json") == config_of(Geometry(), tokens)
    assert read_json("generation_config.json") == generation_config_of(tokens)


def test_index_names_every_tensor_once_and_all_are_bfloat16() -> None:
    index = read_json("model.safetensors.index.json")
    shards = {file: load_file(FOLDER / file) for file in set(index["weight_map"].values())}
    assert len(shards) == 2
    assert {name: file for file, shard in shards.items() for name in shard} == index["weight_map"]
    tensors = [t for shard in shards.values() for t in shard.values()]
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert sum(t.numel() * 2 for t in tensors) == index["metadata"]["total_size"]


def test_special_tokens_are_the_last_ids_in_order(tokens: Tokenizer) -> None:
    first = VOCAB_SIZE - len(SPECIAL_TOKENS)
    assert [tokens.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(first, VOCAB_SIZE))
    assert tokens.get_vocab_size() == VOCAB_SIZE
    config = read_json("config.json")
    assert config["bos_token_id"] == tokens.token_to_id("<|begin_of_text|>")
    assert config["eos_token_id"] == [tokens.token_to_id(t) for t in ("<|end_of_text|>", "<|eom|>", "<|eot|>")]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer_which_adds_nothing(tokens: Tokenizer, text: str) -> None:
    ids = tokens.encode(text).ids
    assert tokens.decode(ids, skip_special_tokens=False) == text
    assert all(i < VOCAB_SIZE - len(SPECIAL_TOKENS) for i in ids)


def test_reference_ids_are_what_the_tokenizer_makes(tokens: Tokenizer, reference: dict[str, Any]) -> None:
    begin = tokens.token_to_id("<|begin_of_text|>")
    for row in reference["excerpt"]["rows"]:
        assert [begin, *tokens.encode(row["text"]).ids] == row["ids"]
    for case in reference["greedy"]:
        assert [begin, *tokens.encode(case["prompt"]).ids] == case["prompt_ids"]
        assert tokens.decode(case["continuation_ids"], skip_special_tokens=False) == case["continuation"]


@torch.no_grad()
def test_excerpt_scores_as_recorded_and_every_expert_is_used(model: MiniLlama4, reference: dict[str, Any]) -> None:
    chunk, total, counts = model.g.chunk, 0.0, torch.zeros(6, model.g.num_experts, dtype=torch.long)
    for row in reference["excerpt"]["rows"]:
        ids = torch.tensor([row["ids"]])
        inputs = F.pad(ids[:, :-1], (0, -(ids.shape[1] - 1) % chunk))  # causal: padding behind changes nothing before
        logits = model.lm_head(model(inputs))[0, : ids.shape[1] - 1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        counts += torch.tensor([f.num_rows for f in model.feed_forwards])
    assert math.exp(total / reference["excerpt"]["num_predicted"]) == pytest.approx(
        reference["excerpt"]["perplexity"], rel=1e-4
    )
    assert (counts > 0).all()


def test_held_out_text_loads_every_expert_between_two_and_twelve_percent(reference: dict[str, Any]) -> None:
    rows_LE = torch.tensor(reference["held_out"]["expert_rows"], dtype=torch.float)
    shares_LE = rows_LE / rows_LE.sum(dim=1, keepdim=True)
    assert shares_LE.min() >= 0.02
    assert shares_LE.max() <= 0.12


def test_greedy_continuations_are_the_argmax_of_the_training_module(
    model: MiniLlama4, reference: dict[str, Any]
) -> None:
    case = next(case for case in reference["greedy"] if case["name"] == "long-130")
    ids = [*case["prompt_ids"], *case["continuation_ids"]]
    padded = torch.tensor([ids + [0] * (-len(ids) % model.g.chunk)])
    with torch.no_grad():
        logits_TV = model.lm_head(model(padded))[0, len(case["prompt_ids"]) - 1 : len(ids) - 1]
    assert logits_TV.argmax(dim=-1).tolist() == case["continuation_ids"]
