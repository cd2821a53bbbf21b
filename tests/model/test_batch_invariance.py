"""A token's logits are the same bits alone, in any batch, and however its sequence was cut into steps.

Greedy and seeded output, and a replay on another worker, are identical for that reason alone. Shown on the CPU; the
widths are those at which kernels switch strategy, and the lengths cross the blocks in which attention takes its keys.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model import linear as linear_module
from llama4_dist.model.linear import linear, pack
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner

MIDDLE: dict[str, Any] = {
    "hidden_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,  # 5 query heads on one key head, as published
    "head_dim": 64,
    "intermediate_size": 200,
    "intermediate_size_mlp": 328,
    "attention_chunk_size": 256,
    "floor_scale": 128,
    "max_position_embeddings": 2048,
}
NUM_PROMPT, NUM_DECODED = 290, 14
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def runner(arithmetic: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("middle"), "scout", dtype=request.param, **MIDDLE)
    return Runner.load(Checkpoint.open(path), dtype=request.param, num_sequences=16, max_tokens=640, block_size=16)


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (NUM_PROMPT + NUM_DECODED,), generator=generator).tolist()


@pytest.fixture(scope="module")
def alone(runner: Runner, token_ids: list[int]) -> Tensor:
    """Logits of one prefill and then one token a step, with no other sequence around."""
    runner.restart()
    return runner.in_chunks(token_ids, [NUM_PROMPT, 1])


@pytest.mark.parametrize("batch_size", [7, 16])
def test_a_sequence_in_a_batch_gives_the_bits_it_gives_alone(
    runner: Runner, token_ids: list[int], alone: Tensor, batch_size: int
) -> None:
    """The others have prompts of 40 to 565 tokens, so keys are padded to other lengths than alone."""
    runner.restart()
    own = batch_size // 2
    prompts = [token_ids[i : i + 1] * (40 + 35 * i) for i in range(batch_size)]
    prompts[own] = token_ids[:NUM_PROMPT]
    logits = [runner.run(list(enumerate(prompts)))[own]]
    for token in token_ids[NUM_PROMPT:]:
        logits.append(runner.run([(i, [token]) for i in range(batch_size)])[own])
    assert torch.equal(torch.cat(logits), alone)


@pytest.mark.parametrize("sizes", [[304], [100, 1, 29, 64], [3, 5, 130, 11], [13]], ids=str)
def test_prefill_chunks_of_any_size_give_the_bits_of_one_prefill(
    runner: Runner, token_ids: list[int], alone: Tensor, sizes: list[int]
) -> None:
    """The last tokens are decoded in `alone`: a prefilled position equals a decoded one, so a replay is exact."""
    runner.restart()
    assert torch.equal(runner.in_chunks(token_ids, sizes), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(320, 200), (1024, 1536), (512, 16)], ids=str)
def test_a_row_of_a_product_does_not_depend_on_the_other_rows(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x_TD, weight_FD = torch.randn(70, shape[0], dtype=dtype), torch.randn(shape[1], shape[0], dtype=dtype)
    for weight in (weight_FD, weight_FD.T.contiguous().T, pack(weight_FD)):  # experts are stored the second way
        expected_TF = linear(x_TD, weight)
        for num_rows in (1, 2, 3, 4, 5, 7, 9, 16, 31, 33, 65):
            assert torch.equal(linear(x_TD[:num_rows], weight), expected_TF[:num_rows])


def test_without_row_tiles_a_row_does_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the test above honest: it can see the difference that the tile removes."""
    monkeypatch.setattr(linear_module, "_ONEDNN_LINEAR", None)
    x_TD, weight_FD = torch.randn(8, 1024), torch.randn(512, 1024)
    one, many = linear(x_TD[:1], weight_FD, row_tile=1), linear(x_TD, weight_FD, row_tile=1)
    if torch.equal(one, many[:1]):
        pytest.skip("this machine's library sums a row alike for any number of rows")
    assert torch.equal(linear(x_TD[:1], weight_FD), linear(x_TD, weight_FD)[:1])
