"""Rows come in order, scaled, and back, bit for bit the same by either implementation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llama4_dist.dispatch import row_passes as module
from llama4_dist.dispatch.row_passes import NativeRowPasses, RowPasses, TorchRowPasses, row_passes
from tests.native.compiler import needs_compiler

CPU = torch.device("cpu")
WIDTH = 37
DTYPES = [torch.float32, torch.bfloat16]
POISON = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[pytest.param("native", marks=needs_compiler), "torch"])
def passes(request: pytest.FixtureRequest, dtype: torch.dtype) -> RowPasses:
    if request.param == "torch":
        return TorchRowPasses()
    found = row_passes(dtype, CPU, WIDTH)
    assert isinstance(found, NativeRowPasses)
    return found


def rows(num_rows: int, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    """All sorts of magnitudes, down to numbers that lose bits."""
    generator = torch.Generator().manual_seed(num_rows)
    exponents = torch.randint(-140, 30, (num_rows, width), generator=generator)
    return torch.ldexp(torch.randn(num_rows, width, generator=generator), exponents).to(dtype)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 5, 64])
def test_each_position_gets_its_copy_times_its_score(
    passes: RowPasses, dtype: torch.dtype, num_tokens: int, num_slots: int
) -> None:
    x_TD, scores_TK = rows(num_tokens, dtype), torch.rand(num_tokens, num_slots).to(dtype)
    order_N = np.random.default_rng(0).permutation(num_tokens * num_slots)
    out_ND = torch.full((len(order_N), x_TD.shape[1]), 7.0, dtype=dtype)
    positions = slice(len(order_N) // 3, len(order_N))
    passes.scale_in_order(x_TD, scores_TK, order_N, positions, out_ND)
    for position, copy in enumerate(order_N.tolist()):
        expected_D = x_TD[copy // num_slots] * scores_TK.flatten()[copy]
        if position < positions.start:
            expected_D = torch.full_like(expected_D, 7.0)  # not asked for
        assert torch.equal(out_ND[position], expected_D)


def test_rows_and_scores_may_be_views_of_something_wider(passes: RowPasses, dtype: torch.dtype) -> None:
    x_TD, scores_TK = rows(6, dtype, 80)[:, 10 : 10 + WIDTH], torch.rand(6, 4).to(dtype)[:, 1:3]
    out_ND = torch.empty(12, WIDTH, dtype=dtype)
    passes.scale_in_order(x_TD, scores_TK, np.arange(12), slice(0, 12), out_ND)
    assert torch.equal(out_ND, (x_TD[:, None] * scores_TK[:, :, None]).flatten(0, 1))


def test_rows_come_back_to_the_places_of_their_copies(passes: RowPasses, dtype: torch.dtype) -> None:
    order_N = np.random.default_rng(1).permutation(50)
    y_RD, out_ND = rows(20, dtype), torch.full((50, WIDTH), 7.0, dtype=dtype)
    assert passes.put_if_finite(y_RD, order_N, slice(15, 35), out_ND)
    assert torch.equal(out_ND[torch.from_numpy(order_N[15:35])], y_RD)
    untouched = torch.from_numpy(np.concatenate([order_N[:15], order_N[35:]]))
    assert (out_ND[untouched] == 7.0).all()


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("place", [(0, 0), (3, 16), (4, 36)])
def test_one_value_that_is_not_finite_is_found(
    passes: RowPasses, dtype: torch.dtype, poison: float, place: tuple[int, int]
) -> None:
    y_RD, out_ND = rows(5, dtype), torch.zeros(5, WIDTH, dtype=dtype)
    assert passes.put_if_finite(y_RD, np.arange(5), slice(0, 5), out_ND)
    y_RD[place] = poison
    assert not passes.put_if_finite(y_RD, np.arange(5), slice(0, 5), out_ND)


def test_the_largest_numbers_are_finite(passes: RowPasses, dtype: torch.dtype) -> None:
    y_RD = torch.full((2, WIDTH), torch.finfo(dtype).max, dtype=dtype)
    assert passes.put_if_finite(y_RD, np.arange(2), slice(0, 2), torch.empty_like(y_RD))


def test_no_rows_are_no_trouble(passes: RowPasses, dtype: torch.dtype) -> None:
    nothing = np.arange(0)
    assert passes.put_if_finite(rows(1, dtype)[:0], nothing, slice(0, 0), torch.empty(3, WIDTH, dtype=dtype))


def test_a_product_that_is_not_a_number_stays_one(passes: RowPasses, dtype: torch.dtype) -> None:
    x_TD = torch.tensor([[float("inf"), float("nan"), *[1.0] * (WIDTH - 2)]], dtype=dtype)
    out_ND = torch.zeros(1, WIDTH, dtype=dtype)
    passes.scale_in_order(x_TD, torch.zeros(1, 1, dtype=dtype), np.arange(1), slice(0, 1), out_ND)
    assert out_ND.isnan().tolist() == [[True, True, *[False] * (WIDTH - 2)]]


@pytest.mark.parametrize(
    ("y_RD", "message"),
    [
        (torch.zeros(3, 4), "size"),
        (torch.zeros(2, 5), "size"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), "size"),
    ],
)
@needs_compiler
def test_a_reply_of_another_size_is_our_own_bug(y_RD: Tensor, message: str) -> None:
    """Links check what peers send; memory is never read beyond a tensor all the same."""
    with pytest.raises(AssertionError, match=message):
        row_passes(torch.float32, CPU, 4).put_if_finite(y_RD, np.arange(9), slice(0, 2), torch.zeros(9, 4))


def test_without_a_compiler_or_for_other_dtypes_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(row_passes(torch.float16, CPU, WIDTH), TorchRowPasses)
    monkeypatch.setattr(module, "extension", lambda: None)
    assert isinstance(row_passes(torch.float32, CPU, WIDTH), TorchRowPasses)
