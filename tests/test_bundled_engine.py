"""The bundled model through the whole engine: what transformers recorded of it must come out again."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist import LLM, Sampling

FOLDER = Path(__file__).parents[1] / "models" / "llama4-mini"
LEAST_MARGIN = 5e-4  # below it, the two best tokens may legitimately change places


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(FOLDER, dtype="float32", num_threads=1) as llm:
        yield llm


def test_greedy_tokens_are_those_of_transformers_with_all_prompts_in_one_batch(
    llm: LLM, reference: dict[str, Any]
) -> None:
    cases = [case for case in reference["greedy"] if case["least_margin"] >= LEAST_MARGIN]
    assert len(cases) >= len(reference["greedy"]) - 1, "the recorded margins leave too little to compare"
    longest = max(len(case["continuation_ids"]) for case in cases)
    answers = llm.generate([case["prompt_ids"] for case in cases], Sampling(temperature=0.0, max_tokens=longest))
    for case, answer in zip(cases, answers, strict=True):
        assert list(answer.token_ids) == case["continuation_ids"], case["name"]
        assert str(answer.finish_reason) == case["finish"], case["name"]


def test_text_prompts_tokenize_as_recorded(llm: LLM, reference: dict[str, Any]) -> None:
    case = next(case for case in reference["greedy"] if case["name"] == "ishmael")
    answer = llm.generate([case["prompt"]], Sampling(temperature=0.0, max_tokens=1))[0]
    assert list(answer.prompt_token_ids) == case["prompt_ids"]


def test_perplexity_of_the_excerpt_is_the_recorded_one(llm: LLM, reference: dict[str, Any]) -> None:
    loss, num_predicted = 0.0, 0
    for row in reference["excerpt"]["rows"]:
        ids = torch.tensor(row["ids"])
        logits_TV = llm.score(row["ids"][:-1])
        loss += torch.nn.functional.cross_entropy(logits_TV, ids[1:], reduction="sum").item()
        num_predicted += len(ids) - 1
    assert num_predicted == reference["excerpt"]["num_predicted"]
    assert math.exp(loss / num_predicted) == pytest.approx(reference["excerpt"]["perplexity"], rel=1e-4)
