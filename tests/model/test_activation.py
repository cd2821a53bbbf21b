"""The logistic function and gated SiLU are torch's, and an element's bits do not depend on where it lies."""

import pytest
import torch
import torch.nn.functional as F

from llama4_dist.model.activation import sigmoid, swiglu

X = torch.randn(4001, generator=torch.Generator().manual_seed(0)) * 5


def all_bfloat16() -> torch.Tensor:
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def test_the_functions_are_those_of_torch() -> None:
    torch.testing.assert_close(sigmoid(X), torch.sigmoid(X), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(swiglu(X, X.flip(0)), F.silu(X) * X.flip(0), rtol=1e-6, atol=1e-6)


def test_values_that_overflow_exp_give_their_limits() -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    assert torch.equal(sigmoid(x), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(swiglu(x, torch.ones(4)), torch.tensor([0.0, 0.0, 100.0, 1e4]))


@pytest.mark.parametrize("x", [X, all_bfloat16()], ids=["float32 sample", "every bfloat16"])
def test_an_element_alone_gives_the_bits_it_gives_among_others(x: torch.Tensor) -> None:
    ones = torch.ones_like(x)
    alone = [(sigmoid(one), swiglu(one, one.new_ones(1))) for one in x[::7].split(1)]
    assert torch.equal(torch.cat([a for a, _ in alone]), sigmoid(x)[::7])
    assert torch.equal(torch.cat([b for _, b in alone]), swiglu(x, ones)[::7])
    strided = torch.stack([x, ones], dim=1)[:, 0]
    assert torch.equal(swiglu(strided, ones), swiglu(x, ones))
