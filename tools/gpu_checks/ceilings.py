"""The two ceilings everything is measured against: a device copy and a large matrix product, both of random data."""

import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_checks.harness import Session, normal

PAUSE_S = 0.3  # a second of products heats the card until it lowers its clocks: short rounds are the higher ceiling
ROUNDS, CALLS = 7, 10


def check_ceilings(session: Session) -> None:
    a, b = (normal(8192, 8192, device=session.device) for _ in range(2))
    seconds = _best(lambda: a @ b)
    session.matrix_rate = 2 * 8192**3 / seconds
    rate = f"{session.matrix_rate / 1e12:.0f} TFLOP/s"
    session.add("bfloat16 matrix product 8192", "measured", seconds=seconds, rate=rate)
    _measure_copy(session)


def _measure_copy(session: Session) -> None:
    # Not in a recorded graph: there a copy goes to the copy engines, which reach 2.7 TB/s where kernels reach 4.3.
    source, target = normal(1 << 31, device=session.device), normal(1 << 31, device=session.device)
    seconds = _best(lambda: target.copy_(source))
    session.copy_rate = 2 * source.nbytes / seconds
    rate = f"{session.copy_rate / 1e12:.2f} TB/s"
    session.add("device copy, 4 GiB, read and written", "measured", seconds=seconds, rate=rate)


def _best(function: Callable[[], Any]) -> float:
    """Return seconds of a call, the best of several means: a ceiling is what the card can do."""
    means: list[float] = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        time.sleep(PAUSE_S)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            function()
        start.record()
        for _ in range(CALLS):
            function()
        end.record()
        torch.cuda.synchronize()
        means.append(start.elapsed_time(end) / 1e3 / CALLS)
    return min(means)
