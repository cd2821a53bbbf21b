"""A store of quantised experts cuts them, counts them and keeps them within a bound, and computes what float64 does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError, UnavailableError
from llama4_dist.model.expert_cut import ExpertCut
from llama4_dist.model.expert_store import ExpertStore
from tests.model.quantised_experts import X_RD, D, in_float64, quantised_expert
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
    widths: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128} if form == "int4-128" else {}
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
