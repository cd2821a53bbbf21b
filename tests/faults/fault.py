"""The faults of `llama4_dist.chaos`, and the one place where a test gives up for want of a tool."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import pytest

from llama4_dist.chaos.faults.fault import Fault, FaultNotVerified, FaultUnavailable, must

__all__ = ["Fault", "FaultNotVerified", "FaultUnavailable", "must", "offered"]

Parameters = ParamSpec("Parameters")
Made = TypeVar("Made")


def offered(make: Callable[Parameters, Made], *arguments: Parameters.args, **options: Parameters.kwargs) -> Made:
    """Make a fault or its ground; skip the test, with the reason, on a machine that cannot."""
    try:
        return make(*arguments, **options)
    except FaultUnavailable as reason:
        pytest.skip(f"the fault was NOT tested: {reason}")
