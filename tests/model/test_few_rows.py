"""A few rows through an input-major weight give the bits that many rows give."""

import pytest
import torch

from llama4_dist.model import few_rows
from llama4_dist.model.few_rows import MAX_ROWS, is_exact, project, sum_of_rows
from llama4_dist.model.linear import linear

SHAPES = [(64, 192), (200, 320), (512, 96), (700, 1024), (1024, 1024), (1600, 64), (5120, 80)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_rows_gives_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x_RD = torch.randn(9, shape[0], generator=generator).to(dtype)
    weight_DF = torch.randn(shape, generator=generator).to(dtype)
    expected_RF = project(x_RD, weight_DF)
    for num_rows in range(1, 9):
        assert torch.equal(project(x_RD[:num_rows], weight_DF), expected_RF[:num_rows])


def test_the_sum_of_rows_is_the_product() -> None:
    x_RD, weight_DF = torch.randn(3, 1300), torch.randn(1300, 40)
    torch.testing.assert_close(sum_of_rows(x_RD, weight_DF), linear(x_RD, weight_DF.T), rtol=1e-4, atol=1e-4)


def test_where_the_bits_would_differ_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of summation, as another machine's library may have, is noticed by the trial."""
    monkeypatch.setattr(few_rows, "SUMMED_TOGETHER", 64)
    for cached in (few_rows._bags, is_exact):
        cached.cache_clear()
    assert not is_exact(1024, 256)
    x_RD, weight_DF = torch.randn(8, 1024), torch.randn(1024, 256)
    assert torch.equal(project(x_RD[:1], weight_DF), project(x_RD, weight_DF)[:1])
    for cached in (few_rows._bags, is_exact):
        cached.cache_clear()


def test_few_rows_do_take_the_short_way_where_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    honest = few_rows.sum_of_rows
    monkeypatch.setattr(few_rows, "is_exact", lambda *shape: True)
    monkeypatch.setattr(few_rows, "sum_of_rows", lambda x, weight: calls.append(len(x)) or honest(x, weight))
    for num_rows in (1, MAX_ROWS, MAX_ROWS + 1):
        project(torch.randn(num_rows, 64), torch.randn(64, 32))
    project(torch.randn(1, 64), torch.randn(32, 64).T)  # stored the other way round
    assert calls == [1, MAX_ROWS]
