"""A store of quantised experts cuts them, counts them and keeps them within a bound, and computes what float64 does."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError, UnavailableError
from llama4_dist.model.expert_cut import ExpertCut
from llama4_dist.model.expert_store import KERNEL_MAPS, ExpertStore
from tests.model.test_expert_store import resident_bytes
from tests.model.test_quantised import X_RD, D, in_float64, quantised_expert
from tests.model.test_residency import anonymous_bytes
from tests.native.compiler import needs_compiler
from tests.quantised_checkpoints import ALL, make_quantised

MIB = 1024 * 1024
CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@pytest.mark.parametrize(
    ("form", "num_slices"),
    [*[(form, 3) for form in (*ALL, "int8-plain")], ("fp8", 2), ("int8", 5), ("int4-channel", 2)],
)
def test_each_slice_computes_its_part(arithmetic: str, form: str, num_slices: int, tmp_path: Path) -> None:
    """96 columns; a float8 slice rounds its own inner rows, so the slices are held against float64 one by one."""
    path = make_quantised(tmp_path, form)
    store = ExpertStore(Checkpoint.open(path), num_slices=num_slices, **CPU)
    units = [3 * num_slices + index for index in range(num_slices)]
    store.add([(1, unit) for unit in units])
    out_RD = torch.empty(len(units) * 5, D)
    x_RD = X_RD[: len(out_RD)]
    store(1, [(unit, 5) for unit in units], x_RD, out_RD)
    for index, unit in enumerate(units):
        _, _, start, stop = store._cut.place((1, unit))
        rows = slice(5 * index, 5 * index + 5)
        expected_RD = in_float64(x_RD[rows], quantised_expert(path, 1, 3, start, stop))
        torch.testing.assert_close(out_RD[rows].double(), expected_RD, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("form", "num_slices", "fitting"),
    [("int4", 4, "1, 3"), ("int8-groups", 7, "1, 3"), ("int4-128", 2, "1")],
)
def test_a_slice_that_would_cut_a_group_is_refused_with_the_numbers_that_fit(
    form: str, num_slices: int, fitting: str, tmp_path: Path
) -> None:
    widths = {"hidden_size": 128, "intermediate_size": 128} if form == "int4-128" else {}
    checkpoint = Checkpoint.open(make_quantised(tmp_path, form, **widths))
    with pytest.raises(ConfigError, match=rf"expert_slices={num_slices} cuts groups .*: take one of {fitting}$"):
        ExpertStore(checkpoint, num_slices=num_slices, **CPU)


@pytest.mark.parametrize("form", [*ALL, "int8-plain"])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_formats_count_the_bytes_that_are_stored(form: str, num_slices: int, tmp_path: Path) -> None:
    """By the tensors themselves; and a slice is as many bytes of memory as its views have."""
    path = make_quantised(tmp_path, form, edit_scale=lambda scale: scale.bfloat16())
    checkpoint = Checkpoint.open(path)
    (stored,) = checkpoint.expert_formats
    cut = ExpertCut.of(checkpoint, weight_format="stored", num_slices=num_slices, **CPU)
    for columns in cut.bounds:
        weights = quantised_expert(path, 1, 3, columns.start, columns.stop)
        assert stored.slice_bytes(D, len(columns)) == sum(part.numel() * part.itemsize for part in weights.tensors())
    with pytest.raises(UnavailableError, match="do not fit"):
        ExpertStore(checkpoint, num_slices=num_slices, capacity_bytes=cut.most_bytes - 1, **CPU).add([(1, 0)])


@needs_compiler
def test_room_is_planned_with_what_an_expert_takes_when_it_computes(tmp_path: Path) -> None:
    """Numbers with a scale an output are copied, int4 into bytes; groups stay as stored but while they compute."""
    num_weights = 3 * D * 96

    def sizes(form: str, **options: Any) -> tuple[int, int]:
        checkpoint = Checkpoint.open(make_quantised(tmp_path / form, form))
        cut = ExpertCut.of(checkpoint, weight_format="stored", num_slices=1, **{**CPU, **options})
        return cut.most_bytes, cut.computed_bytes_of(0)

    packed = num_weights + 4 * (96 + 96 + D)
    assert sizes("fp8") == sizes("int4-channel") == (packed, packed)
    assert sizes("int4") == (num_weights // 2 + num_weights // 32 * 4, 4 * num_weights)
    assert sizes("int4", dtype=torch.float16) == (num_weights // 2 + num_weights // 32 * 4,) * 2, "no native pass"
    assert sizes("fp8", dtype=torch.bfloat16, device="cuda") == (2 * num_weights,) * 2, "values on a device"


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
    residency = bounded.residency
    assert residency is not None
    for (layer, groups, x_RD), right_RD in zip(questions, expected, strict=True):
        bounded(layer, groups, x_RD, out_RD)
        assert torch.equal(out_RD, right_RD)
        assert residency.num_resident * weight_bytes <= residency.bytes_resident <= limit
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
    prints = [store.fingerprint(pair) for pair in pairs]
    assert resident_bytes(path) < 4 * MIB
    assert prints == [free.fingerprint(pair) for pair in pairs]


def test_floats_beside_quantised_experts_are_bound_as_floats_are(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_quantised(tmp_path, "int4", ignored_layers=(0,)))
    with pytest.raises(ConfigError, match=r"as they are stored \(float32\), not in torch.bfloat16"):
        ExpertStore(checkpoint, residency_bytes=1, dtype=torch.bfloat16, device="cpu")
    quantised = Checkpoint.open(make_quantised(tmp_path / "all", "int4"))
    ExpertStore(quantised, residency_bytes=1, dtype=torch.bfloat16, device="cpu")
