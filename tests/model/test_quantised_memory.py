"""Quantised experts under a bound on memory: a file of its own, for which no other file's arithmetic is still set."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError
from llama4_dist.model.expert import Experts
from llama4_dist.model.expert_store import KERNEL_MAPS, ExpertStore
from tests.model.test_expert_store import resident_bytes
from tests.model.test_residency import anonymous_bytes
from tests.native.compiler import needs_compiler
from tests.quantised_checkpoints import make_quantised

MIB = 1024 * 1024
CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module", params=["fp8", "int4", "int4-channel"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """32 experts of 1.5 million weights."""
    path = make_quantised(
        tmp_path_factory.mktemp(request.param), request.param, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=2, no_rope_layers=[1, 0],
    )  # fmt: skip
    return request.param, path


@needs_compiler
@pytest.mark.parametrize("num_slices", [1, 2])
def test_memory_stays_within_the_bound_and_every_bit_is_the_same(wide: tuple[str, Path], num_slices: int) -> None:
    """Of expanded experts six MiB each, of packed ones one and a half."""
    form, path = wide
    limit = 13 * MIB if form == "int4" else 4 * MIB
    chance, questions = random.Random(0), []
    for _ in range(40):
        units = sorted(chance.sample(range(16 * num_slices), 3))
        questions.append((chance.randrange(2), tuple((unit, 1) for unit in units), torch.randn(3, 512)))
    pairs = [(layer, unit) for layer in range(2) for unit in range(16 * num_slices)]
    weight_bytes = 3 * 512 * 1024 * (4 if form == "int4" else 1) // num_slices
    free = ExpertStore(Checkpoint.open(path), num_slices=num_slices, **CPU)
    free.add(pairs)
    expected = [torch.empty(3, 512) for _ in questions]
    for (layer, groups, x_RD), out_RD in zip(questions, expected, strict=True):
        free(layer, groups, x_RD, out_RD)
    free.remove(pairs)
    bounded = ExpertStore(Checkpoint.open(path), num_slices=num_slices, residency_bytes=limit, **CPU)
    bounded.add(pairs)
    before, out_RD = anonymous_bytes() + resident_bytes(path), torch.empty(3, 512)
    residency, experts = bounded.residency, bounded._experts
    assert residency is not None
    assert isinstance(experts, Experts)
    for (layer, groups, x_RD), right_RD in zip(questions, expected, strict=True):
        bounded(layer, groups, x_RD, out_RD)
        assert torch.equal(out_RD, right_RD)
        assert residency.num_resident * weight_bytes <= residency.bytes_resident <= limit
        num_copies = sum("network" in vars(one) for one in experts._held.values())
        assert num_copies == (0 if form == "int4" else residency.num_resident)
        assert experts.bytes_expanded <= (limit if form == "int4" else 0)
        used = anonymous_bytes() + resident_bytes(path) - before
        assert used < limit + 2 * KERNEL_MAPS + 8 * MIB, "of 48 that are stored in eight bits, or of 192 expanded"
    assert residency.hits + residency.misses == 3 * len(questions)
    assert residency.hits > 0
    bounded.remove(pairs)
    assert residency.num_resident == 0
    assert anonymous_bytes() + resident_bytes(path) - before < 8 * MIB


@needs_compiler
def test_a_fingerprint_leaves_nothing_in_memory_that_was_not_there(wide: tuple[str, Path]) -> None:
    _, path = wide
    store = ExpertStore(Checkpoint.open(path), residency_bytes=20 * MIB, **CPU)
    free = ExpertStore(Checkpoint.open(path), **CPU)
    pairs = [(0, expert) for expert in range(12)]
    for one in (store, free):
        one.add(pairs)
    before = resident_bytes(path)
    prints = [store.fingerprint(pair) for pair in pairs]
    assert resident_bytes(path) - before < 4 * MIB
    assert prints == [free.fingerprint(pair) for pair in pairs]


def test_floats_beside_quantised_experts_are_bound_as_floats_are(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_quantised(tmp_path, "int4", ignored_layers=(0,)))
    with pytest.raises(ConfigError, match=r"as they are stored \(float32\), not in torch.bfloat16"):
        ExpertStore(checkpoint, residency_bytes=1, dtype=torch.bfloat16, device="cpu")
    quantised = Checkpoint.open(make_quantised(tmp_path / "all", "int4"))
    ExpertStore(quantised, residency_bytes=1, dtype=torch.bfloat16, device="cpu")
