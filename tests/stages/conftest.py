"""The arithmetic of the model's tests, and one thread for it: members are threads already."""

from collections.abc import Iterator

import pytest

from llama4_dist.native import threads
from tests.model.conftest import arithmetic, in_torch  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def one_thread_a_member() -> Iterator[None]:
    before = threads.count()
    threads.set_count(1)
    yield
    threads.set_count(before)
