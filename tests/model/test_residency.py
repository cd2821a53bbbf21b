"""Experts that do not all stay in memory: the same bits, the least recently used go, and memory stays bounded."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError
from llama4_dist.model.expert_store import KERNEL_MAPS, ExpertStore
from llama4_dist.model.held_expert import Pair
from llama4_dist.model.residency import Residency
from tests.checkpoints import make_checkpoint
from tests.model.test_expert_store import resident_bytes
from tests.native.compiler import needs_compiler

MIB = 1024 * 1024
D = 512


class Memory:
    """A residency of slices of 10 bytes each, and what it has done."""

    def __init__(self, limit_bytes: int) -> None:
        self.events: list[tuple[str, Pair]] = []
        self.residency = Residency(
            limit_bytes,
            bytes_of=lambda pair: 10,
            read_ahead=lambda pair: self.events.append(("read", pair)),
            let_go=lambda pair: self.events.append(("go", pair)),
        )

    def ask(self, layer: int, *units: int) -> list[list[int]]:
        """Return the units of each part."""
        self.events.clear()
        return [[unit for unit, _ in part] for part in self.residency.parts(layer, [(unit, 1) for unit in units])]


def test_the_least_recently_used_slices_go_first() -> None:
    memory = Memory(30)
    assert memory.ask(0, 0, 1, 2) == [[0, 1, 2]]
    assert memory.events == [("read", (0, 0)), ("read", (0, 1)), ("read", (0, 2))]
    memory.ask(0, 0)
    assert memory.events == []
    memory.ask(1, 0)
    assert memory.events == [("go", (0, 1)), ("read", (1, 0))]
    one = memory.residency
    assert (one.hits, one.misses, one.num_resident, one.bytes_resident) == (1, 4, 3, 30)
    assert [one.is_resident(pair) for pair in ((0, 0), (0, 1), (0, 2), (1, 0))] == [True, False, True, True]


def test_what_does_not_fit_together_is_computed_in_parts() -> None:
    memory = Memory(25)
    assert memory.ask(0, 0, 1, 2, 3, 4) == [[0, 1], [2, 3], [4]]
    assert memory.residency.bytes_resident <= 25
    assert memory.events.index(("go", (0, 0))) < memory.events.index(("read", (0, 2))), "room is made before"


def test_one_slice_that_is_larger_than_the_bound_is_computed_alone() -> None:
    memory = Memory(5)
    assert memory.ask(0, 0, 1) == [[0], [1]]
    assert memory.residency.bytes_resident == 10


def test_a_slice_without_rows_is_neither_read_nor_counted() -> None:
    memory = Memory(30)
    parts = list(memory.residency.parts(0, [(0, 0), (1, 2)]))
    assert parts == [[(0, 0), (1, 2)]]
    assert memory.events == [("read", (0, 1))]


def test_a_slice_that_is_held_no_more_is_forgotten() -> None:
    memory = Memory(30)
    memory.ask(0, 0, 1)
    memory.residency.forget((0, 0))
    memory.residency.forget((7, 7))
    assert memory.residency.bytes_resident == 10
    memory.ask(0, 2, 3)
    assert ("go", (0, 0)) not in memory.events


@pytest.fixture(scope="module", params=["fused", "per_expert"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 experts of 6 MiB."""
    return make_checkpoint(
        tmp_path_factory.mktemp("scout"), "scout", layout=request.param, hidden_size=D, intermediate_size=1024,
        num_hidden_layers=2, no_rope_layers=[1, 0],
    )  # fmt: skip


def anonymous_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@needs_compiler
@pytest.mark.parametrize("weight_format", ["stored", "int8"])
@pytest.mark.parametrize("num_slices", [1, 2])
def test_memory_stays_within_the_bound_and_every_bit_is_the_same(
    model_dir: Path, num_slices: int, weight_format: str
) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "weight_format": weight_format}
    checkpoint = Checkpoint.open(model_dir)
    free = ExpertStore(Checkpoint.open(model_dir), num_slices=num_slices, **options)
    limit = 12 * MIB if weight_format == "stored" else 4 * MIB
    bounded = ExpertStore(checkpoint, num_slices=num_slices, residency_bytes=limit, **options)
    pairs = [(layer, unit) for layer in range(2) for unit in range(16 * num_slices)]
    chance, questions = random.Random(0), []
    for _ in range(40):
        units = sorted(chance.sample(range(16 * num_slices), 3))
        questions.append((chance.randrange(2), tuple((unit, 1) for unit in units), torch.randn(3, D)))
    free.add(pairs)
    expected = [torch.empty(3, D) for _ in questions]
    for (layer, groups, x_RD), out_RD in zip(questions, expected, strict=True):
        free(layer, groups, x_RD, out_RD)
    free.remove(pairs)
    bounded.add(pairs)
    before, out_RD = anonymous_bytes() + resident_bytes(model_dir), torch.empty(3, D)
    residency = bounded.residency
    assert residency is not None
    for (layer, groups, x_RD), right_RD in zip(questions, expected, strict=True):
        bounded(layer, groups, x_RD, out_RD)
        assert torch.equal(out_RD, right_RD)
        assert residency.bytes_resident <= limit
        # Beside each matrix that lies in the file the kernel maps some of its neighbours.
        spilled = residency.num_resident * 2 * 2 * KERNEL_MAPS
        used = anonymous_bytes() + resident_bytes(model_dir) - before
        assert used < limit + spilled + 8 * MIB, "of 192 that are held"
    assert residency.hits + residency.misses == 3 * len(questions)
    assert residency.hits > 0
    bounded.remove(pairs)
    assert residency.num_resident == 0
    assert resident_bytes(model_dir) < 4 * MIB


@needs_compiler
def test_a_fingerprint_leaves_nothing_in_memory_that_was_not_there(model_dir: Path) -> None:
    store = ExpertStore(Checkpoint.open(model_dir), dtype=torch.float32, device="cpu", residency_bytes=20 * MIB)
    free = ExpertStore(Checkpoint.open(model_dir), dtype=torch.float32, device="cpu")
    pairs = [(0, expert) for expert in range(12)]
    for one in (store, free):
        one.add(pairs)
    prints = [store.fingerprint(pair) for pair in pairs]
    assert resident_bytes(model_dir) < 4 * MIB
    assert prints == [free.fingerprint(pair) for pair in pairs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residency_bytes": 0}, "expert_memory_bytes=0 must be at least 1"),
        ({"residency_bytes": 1, "dtype": torch.bfloat16}, r"as they are stored \(float32\), not in torch.bfloat16"),
        ({"residency_bytes": 1, "device": "cuda"}, "needs device='cpu', not 'cuda'"),
    ],
)
def test_a_bound_that_cannot_be_kept_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout"))
    with pytest.raises(ConfigError, match=message):
        ExpertStore(checkpoint, **{"dtype": torch.float32, "device": "cpu", **options})
