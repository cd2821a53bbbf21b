"""Few rows through input-major weights give the bits that many rows give, with and without the native pass."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from llama4_dist.model import few_rows
from llama4_dist.model.few_rows import MAX_ROWS, SUMS, exact_sums, multiply_few_rows, passes, project_groups
from llama4_dist.model.linear import linear
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler

SHAPES = [(64, 192), (200, 320), (512, 97), (700, 1024), (1024, 1023), (1600, 64), (5120, 80)]
NUMS_ROWS = [1, 2, 3, 4, 5, 6, 7, 9, 12, 13, MAX_ROWS, MAX_ROWS + 1]


def project(x_RD: Tensor, weight_DF: Tensor) -> Tensor:
    out_RF = torch.full((len(x_RD), weight_DF.shape[1]), float("nan"), dtype=x_RD.dtype)
    project_groups(x_RD, [len(x_RD)], [weight_DF], out_RF)
    return out_RF


def native(x_RD: Tensor, weight_DF: Tensor, summed_together: int) -> Tensor:
    out_RF = torch.full((len(x_RD), weight_DF.shape[1]), float("nan"))
    multiply_few_rows(x_RD, [0], [len(x_RD)], weight_DF, [weight_DF.data_ptr()], out_RF, summed_together)
    return out_RF


def sums_one_by_one(x_RD: Tensor, weight_DF: Tensor, summed_together: int) -> Tensor:
    """The order of summation, spelled out; a product and its sum are rounded once, as float64 lets us do."""
    total_RF = torch.zeros(len(x_RD), weight_DF.shape[1])
    for begin in range(0, len(weight_DF), summed_together):
        sum_RF = torch.zeros_like(total_RF)
        for k in range(begin, min(begin + summed_together, len(weight_DF))):
            sum_RF = (sum_RF.double() + x_RD[:, k : k + 1].double() * weight_DF[k].double()).float()
        total_RF = total_RF + sum_RF
    return total_RF


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_a_compiler_gives_the_native_pass() -> None:
    """Else the tests below would compare the library with itself."""
    assert passes() is not None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_rows_gives_the_bits_of_many(
    shape: tuple[int, int], dtype: torch.dtype, random: torch.Generator
) -> None:
    x_RD = torch.randn(MAX_ROWS + 1, shape[0], generator=random).to(dtype)
    weight_DF = torch.randn(shape, generator=random).to(dtype)
    expected_RF = linear(x_RD, weight_DF.T)
    for num_rows in NUMS_ROWS:
        assert torch.equal(project(x_RD[:num_rows], weight_DF), expected_RF[:num_rows])


@pytest.mark.parametrize("summed_together", SUMS)
def test_the_native_pass_sums_in_the_order_it_says(summed_together: int, random: torch.Generator) -> None:
    """Against float64 steps; where they round twice, the last bit may differ, which happens once in 2^29 steps."""
    x_RD, weight_DF = torch.randn(7, 1300, generator=random), torch.randn(1300, 150, generator=random)
    assert torch.equal(native(x_RD, weight_DF, summed_together), sums_one_by_one(x_RD, weight_DF, summed_together))
    assert not torch.equal(native(x_RD, weight_DF, SUMS[0]), native(x_RD, weight_DF, SUMS[1]))


def test_each_group_meets_its_own_weight(random: torch.Generator) -> None:
    nums_rows = [3, 1, MAX_ROWS + 5, 8]
    weights = [torch.randn(96, 160, generator=random) for _ in nums_rows]
    x_RD = torch.randn(sum(nums_rows), 96, generator=random)
    out_RF = torch.full((len(x_RD), 160), float("nan"))
    project_groups(x_RD, nums_rows, weights, out_RF)
    expected = [x @ weight for x, weight in zip(x_RD.split(nums_rows), weights, strict=True)]
    torch.testing.assert_close(out_RF, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_views_of_wider_tensors_are_read_and_written_in_place(random: torch.Generator) -> None:
    """Slices of an expert's width are columns of the mapped matrix; gate and up are halves of one output."""
    weight_D2F, x_RD = torch.randn(64, 192, generator=random), torch.randn(3, 128, generator=random)[:, 32:96]
    out_R2F = torch.full((3, 192), float("nan"))
    project_groups(x_RD, [3], [weight_D2F[:, 40:136]], out_R2F[:, 96:])
    torch.testing.assert_close(out_R2F[:, 96:], x_RD @ weight_D2F[:, 40:136], rtol=1e-4, atol=1e-4)
    assert out_R2F[:, :96].isnan().all()


def test_where_the_bits_would_differ_the_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of summation, as another machine's library may have, is noticed by the trial."""
    x_RD, weight_DF = torch.randn(8, 1024), torch.randn(1024, 256)
    assert exact_sums(1024) != 0
    monkeypatch.setattr(few_rows, "SUMS", (64, 128))
    exact_sums.cache_clear()
    try:
        assert exact_sums(1024) == 0
        assert torch.equal(project(x_RD[:1], weight_DF), linear(x_RD, weight_DF.T)[:1])
    finally:
        exact_sums.cache_clear()


def test_few_rows_do_take_the_native_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_sums(64)  # its own trial is not counted
    calls: list[Sequence[int]] = []
    honest = few_rows.multiply_few_rows
    monkeypatch.setattr(few_rows, "multiply_few_rows", lambda *args: calls.append(args[2]) or honest(*args))
    for num_rows in (1, MAX_ROWS, MAX_ROWS + 1):
        project(torch.randn(num_rows, 64), torch.randn(64, 32))
    project(torch.randn(1, 64), torch.randn(32, 64).T)  # stored the other way round
    assert calls == [[1], [MAX_ROWS]]


def test_without_the_native_pass_the_library_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x_RD, weight_DF = torch.randn(3, 64), torch.randn(64, 32)
    expected_RF = project(x_RD, weight_DF)
    monkeypatch.setattr(few_rows, "passes", lambda: None)
    assert torch.equal(project(x_RD, weight_DF), expected_RF)
