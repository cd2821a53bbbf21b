"""Sorts the copies of a step's rows by expert, on the device and without waiting for the host."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_dist.gpu.stream_linear import RowGroups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SortedRows:
    """All copies sorted by expert, for `grouped_gemm`: row r is copy `order_R[r]`, expert e's end at starts[e + 1].

    Without an order, they are where they were.
    """

    order_R: Tensor | None
    starts: Tensor


def sort_rows(experts_N: Tensor, num_experts: int) -> SortedRows:
    """Order copies by expert, copies of one expert by their number."""
    sorted_N, order_R = experts_N.sort(stable=True)
    starts = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, dtype=torch.int32, device=experts_N.device))
    return SortedRows(order_R=order_R.int(), starts=starts.int())


def group_rows(experts_N: Tensor, num_experts: int, *, max_groups: int, max_rows: int) -> RowGroups:
    """Do the same for few copies in one launch, and list only experts with rows: `max_groups` bounds how many.

    Copies with an expert outside [0, num_experts) are left out.
    """
    num_copies = experts_N.shape[0]
    order_R = torch.empty_like(experts_N)
    starts = experts_N.new_empty(max_groups + 1)
    experts = experts_N.new_empty(max_groups)
    group_rows_kernel[(1,)](
        experts_N,
        order_R,
        starts,
        experts,
        num_copies,
        num_experts,
        max_groups,
        COPIES=triton.next_power_of_2(num_copies),
        GROUPS=triton.next_power_of_2(max_groups + 1),
        num_warps=4,
    )
    return RowGroups(num_groups=max_groups, max_rows=max_rows, starts=starts, experts=experts, order_R=order_R)


def group_rows_reference(experts_N: Tensor, num_experts: int) -> tuple[list[int], list[int], list[int]]:
    """Return order, starts and experts as lists."""
    known = [copy for copy, expert in enumerate(experts_N.tolist()) if 0 <= expert < num_experts]
    order = sorted(known, key=lambda copy: int(experts_N[copy]))
    experts = sorted({int(experts_N[copy]) for copy in known})
    starts = [sum(int(experts_N[copy]) < expert for copy in known) for expert in experts]
    return order, [*starts, len(known)], experts


@triton.jit
def group_rows_kernel(
    copies_experts,
    order,
    starts,
    experts,
    num_copies,
    num_experts,
    max_groups,
    COPIES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    copy = tl.arange(0, COPIES)
    mine = tl.load(copies_experts + copy, mask=copy < num_copies, other=num_experts)
    is_known = (mine >= 0) & (mine < num_experts)
    rank = tl.zeros((COPIES,), dtype=tl.int32)
    smaller_experts = tl.zeros((COPIES,), dtype=tl.int32)  # distinct experts before mine
    is_first = is_known
    num_known = 0
    num_groups = 0
    for other in range(num_copies):
        theirs = tl.load(copies_experts + other)
        other_is_known = (theirs >= 0) & (theirs < num_experts)
        before = (theirs < mine) | ((theirs == mine) & (other < copy))
        rank += (other_is_known & before).to(tl.int32)
        is_first = is_first & ((theirs != mine) | (other >= copy))
        num_known += other_is_known.to(tl.int32)
    for other in range(num_copies):
        theirs = tl.load(copies_experts + other)
        other_is_first = tl.sum((is_first & (copy == other)).to(tl.int32), 0)
        smaller_experts += tl.where(theirs < mine, other_is_first, 0)
        num_groups += other_is_first
    tl.store(order + rank, copy, mask=is_known)
    tl.store(starts + smaller_experts, rank, mask=is_first)
    tl.store(experts + smaller_experts, mine, mask=is_first)
    group = tl.arange(0, GROUPS)
    tl.store(starts + group, num_known, mask=(group >= num_groups) & (group <= max_groups))
    tl.store(experts + group, 0, mask=(group >= num_groups) & (group < max_groups))
