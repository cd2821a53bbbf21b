"""The model on one device: what each rule of Llama 4 moves, and what padding rows leave alone. In the interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError
from llama4_dist.gpu import layer as gpu_layer
from llama4_dist.gpu.model import GpuLlama4
from llama4_dist.gpu.row_kernels import add_norm_and_route
from llama4_dist.model.batch import Batch, PageRun, SequenceSpan
from llama4_dist.model.kv_cache import KVCache
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner

TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
# Chunks of 4 and a temperature from position 4 on, so that eleven tokens meet every rule.
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 4, "floor_scale": 4}
TOLERANCE = 1e-5
MOVED = 1e-2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("scout"), "scout", **SMALL))


@pytest.fixture
def model(checkpoint: Checkpoint) -> GpuLlama4:
    return GpuLlama4.load(checkpoint, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def expected_TV(checkpoint: Checkpoint) -> Tensor:
    return Runner.load(checkpoint).in_chunks(list(TOKENS), [len(TOKENS)])


def span(num_tokens: int, num_cached: int) -> SequenceSpan:
    pages = tuple(PageRun(first_block=0, ids=tuple(range(group, 6, 2))) for group in range(2))
    return SequenceSpan(num_tokens=num_tokens, num_cached=num_cached, pages=pages)


def new_cache(checkpoint: Checkpoint) -> KVCache:
    return KVCache(checkpoint.config, num_pages=6, block_size=4, dtype=torch.float32, device="cpu")


def logits(model: GpuLlama4, checkpoint: Checkpoint) -> Tensor:
    batch = Batch(
        step=1,
        token_ids_T=torch.tensor(TOKENS),
        spans=(span(len(TOKENS), 0),),
        logit_rows=tuple(range(len(TOKENS))),
    )
    return model.forward(batch, new_cache(checkpoint))


def deviation(found_TV: Tensor, expected_TV: Tensor) -> float:
    return float((found_TV - expected_TV).abs().max() / expected_TV.abs().max())


def test_logits_are_those_of_the_model_over_hosts(
    model: GpuLlama4, checkpoint: Checkpoint, expected_TV: Tensor
) -> None:
    assert deviation(logits(model, checkpoint), expected_TV) < TOLERANCE


@pytest.mark.parametrize(
    ("layer", "rule", "value"),
    [
        (0, "has_rope", False),
        (0, "has_qk_norm", False),
        (0, "is_chunked", False),
        (1, "has_rope", True),
        (1, "has_temperature", False),
    ],
)
def test_each_rule_of_attention_shows(
    model: GpuLlama4, checkpoint: Checkpoint, expected_TV: Tensor, layer: int, rule: str, value: bool
) -> None:
    assert getattr(model.layers[layer], rule) is not value
    setattr(model.layers[layer], rule, value)
    assert deviation(logits(model, checkpoint), expected_TV) > MOVED


def test_a_score_left_out_shows(
    model: GpuLlama4, checkpoint: Checkpoint, expected_TV: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = add_norm_and_route

    def without_score(x_TD: Tensor, *arguments: Tensor, copies_ND: Tensor, **others: Any) -> None:
        honest(x_TD, *arguments, copies_ND=copies_ND, **others)
        copies_ND[: len(x_TD)] = copies_ND[len(x_TD) :]

    monkeypatch.setattr(gpu_layer, "add_norm_and_route", without_score)
    assert deviation(logits(model, checkpoint), expected_TV) > MOVED


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # padding rows hold what the memory held before
def test_padding_rows_change_neither_logits_nor_cache(model: GpuLlama4, checkpoint: Checkpoint) -> None:
    found = []
    for num_rows in (1, 4):
        cache = new_cache(checkpoint)
        tables = model.writer([span(1, 5)], num_rows).write([7], [span(1, 5)])
        found.append((model.logits(*model.run_layers(tables, cache))[0], cache._storage))
    (alone_V, storage), (padded_V, padded_storage) = found
    torch.testing.assert_close(padded_V, alone_V, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded_storage, storage, rtol=1e-5, atol=1e-5)
    assert storage.count_nonzero() > 0


@pytest.mark.parametrize("expert_format", ["float8", "int4"])
def test_quantized_experts_come_near(tmp_path: Path, expert_format: str) -> None:
    path = make_checkpoint(tmp_path, "scout", **SMALL, hidden_size=128, intermediate_size=128)
    checkpoint = Checkpoint.open(path)
    expected_TV = Runner.load(checkpoint).in_chunks(list(TOKENS), [len(TOKENS)])
    model = GpuLlama4.load(checkpoint, dtype=torch.float32, device="cpu", expert_format=expert_format)
    error = deviation(logits(model, checkpoint), expected_TV)
    assert 1e-4 < error < 0.5


def test_an_unknown_format_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="'int3' is none of stored, float8, int4"):
        GpuLlama4.load(checkpoint, dtype=torch.float32, device="cpu", expert_format="int3")
