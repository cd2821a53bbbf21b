"""One thread for the arithmetic: the tests are tiny, and two threads that wait for each other are slower."""

from collections.abc import Callable, Iterator

import pytest
import torch

from llama4_dist.model import expert, load
from llama4_dist.native import threads
from llama4_dist.native.bindings import passes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def in_torch() -> Iterator[None]:
    """Compute as where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (expert, load):
            patch.setattr(module, "is_native", lambda dtype, device: False)
        yield


@pytest.fixture(scope="module", params=["native", "torch"])
def arithmetic(request: pytest.FixtureRequest) -> str:
    """Compute with native passes, and as where there is no compiler."""
    if request.param == "torch":
        request.getfixturevalue("in_torch")
    elif passes() is None:
        pytest.skip("there is no compiler")
    return str(request.param)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    yield threads.set_count
    threads.set_count(1)
