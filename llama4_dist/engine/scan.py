"""Finds the likeliest token of each row of logits and whether the row is finite: on a processor in one reading."""

import torch
from torch import Tensor

from llama4_dist.native import threads
from llama4_dist.native.bindings import passes


def scan(logits_PV: Tensor) -> tuple[list[int], list[bool]]:
    """Return each row's lowest id among its largest logits, and whether all its logits are finite.

    Of a row that is not finite the id is any.
    """
    native = passes() if logits_PV.is_cpu and logits_PV.dtype == torch.float32 and logits_PV.stride(1) == 1 else None
    if native is None:
        return logits_PV.argmax(dim=1).tolist(), torch.isfinite(logits_PV).all(dim=1).tolist()
    num_rows, num_columns = logits_PV.shape
    best_P = torch.empty(num_rows, dtype=torch.int64)
    finite_P = torch.empty(num_rows, dtype=torch.bool)
    native.l4d_scan_logits(
        logits_PV.data_ptr(),
        logits_PV.stride(0),
        num_rows,
        num_columns,
        best_P.data_ptr(),
        finite_P.data_ptr(),
        threads.count(),
    )
    return best_P.tolist(), finite_P.tolist()
