"""The two ceilings everything is measured against: a device copy and a large matrix product, both of random data."""

import torch

from gpu_checks.harness import Session, bench, normal


def check_ceilings(session: Session) -> None:
    _measure_memory(session)
    _measure_products(session)


def _measure_memory(session: Session) -> None:
    device = session.device
    source, target = normal(1 << 31, device=device), torch.empty(1 << 31, device=device, dtype=torch.bfloat16)
    seconds = bench([lambda: target.copy_(source)])
    session.copy_rate = 2 * source.nbytes / seconds
    session.add("device copy, 4 GiB", "measured", seconds=seconds, rate=f"{session.copy_rate / 1e12:.2f} TB/s")
    seconds = bench([lambda: torch.sum(source.view(torch.int16), dtype=torch.int64)])
    rate = f"{source.nbytes / seconds / 1e12:.2f} TB/s"
    session.add("device read (torch sum)", "measured", seconds=seconds, rate=rate)


def _measure_products(session: Session) -> None:
    device = session.device
    a, b = normal(8192, 8192, device=device), normal(8192, 8192, device=device)
    seconds = bench([lambda: a @ b] * 5)
    session.matrix_rate = 2 * 8192**3 / seconds
    rate = f"{session.matrix_rate / 1e12:.0f} TFLOP/s"
    session.add("bfloat16 matrix product 8192", "measured", seconds=seconds, rate=rate)
