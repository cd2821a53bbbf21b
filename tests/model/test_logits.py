"""Float32 logits of every preset are those of transformers, however a sequence is cut into steps and packed."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner
from tests.model.references import load_reference, reference_logits

PRESETS = ["scout", "maverick", "behemoth", "dense", "topk2", "v5", "conditional"]
TOLERANCE = 2e-4  # any two of transformers' own paths differ by 2e-5; a wrong reading moves logits by 0.1 and more
LENGTHS = [110, 83, 33]  # chunks of 16 and temperature floors of 32 both have edges inside


@dataclass
class Case:
    runner: Runner
    prompts: list[list[int]]
    expected: list[Tensor]


@pytest.fixture(scope="module", params=[(p, s) for p in PRESETS for s in (0, 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(arithmetic: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    preset, seed = request.param
    path: Path = make_checkpoint(tmp_path_factory.mktemp(preset), preset, seed=seed)
    reference = load_reference(path, preset)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]
    runner = Runner.load(Checkpoint.open(path), num_sequences=3)
    return Case(runner, prompts, [reference_logits(reference, prompt) for prompt in prompts])


@pytest.fixture(autouse=True)
def fresh_sequences(case: Case) -> None:
    case.runner.restart()


def assert_close(logits_TV: Tensor, expected_TV: Tensor) -> None:
    torch.testing.assert_close(logits_TV, expected_TV, rtol=0.0, atol=TOLERANCE)


def test_one_prefill_gives_the_reference_logits(case: Case) -> None:
    (logits_TV,) = case.runner.run([(0, case.prompts[0])])
    assert_close(logits_TV, case.expected[0])


def test_odd_prefill_chunks_give_the_reference_logits(case: Case) -> None:
    assert_close(case.runner.in_chunks(case.prompts[0], [7, 13, 1, 31, 5]), case.expected[0])


def test_decoding_token_by_token_gives_the_reference_logits(case: Case) -> None:
    assert_close(case.runner.in_chunks(case.prompts[0], [5, 1]), case.expected[0])


def test_packed_sequences_give_each_the_reference_logits(case: Case) -> None:
    """Prefill chunks and decode tokens of three sequences share steps; the sequences start and end at other times."""
    collected: list[list[Tensor]] = [[], [], []]
    sizes = [[30, 1, 1, 40, 1, 37], [1, 1, 17, 1, 61, 2], [2, 29, 1, 1]]
    for step in range(6):
        parts = []
        for index, planned in enumerate(sizes):
            if step < len(planned):
                start = sum(planned[:step])
                parts.append((index, case.prompts[index][start : start + planned[step]]))
        for (index, _), logits_TV in zip(parts, case.runner.run(parts), strict=True):
            collected[index].append(logits_TV)
    for logits, expected_TV in zip(collected, case.expected, strict=True):
        assert_close(torch.cat(logits), expected_TV)
