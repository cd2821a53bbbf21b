"""Attention over cached pages: what one layer's launch reads, the launch itself, and the slow version it is judged by.

The kernels are in `attention_kernels`; what they are asked for, tile by tile, is decided in `step_tables`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_dist.gpu.attention_kernels import attend_kernel, merge_splits_kernel
from llama4_dist.gpu.tiles import precision_of

DECODE_ROWS = 64  # of one tile: queries times the heads that share a key head
PREFILL_ROWS = 128  # a row's bits are the same in both: a warp holds 16 whole rows either way
KEYS_PER_TILE = 64
KEYS_PER_SPLIT = 256
ROWS_PER_WARP = 16
NUM_STAGES = 3
ITEM_FIELDS = 5
SPLITS_AT_ONCE = 8  # merged with their loads under way together


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionWork:
    """Tiles of queries, int32 [items, ITEM_FIELDS] on the device; `max_splits` bounds the splits of any of them.

    Fields: first row, its position, number of queries, position of the first key, sequence.
    """

    items: Tensor
    max_splits: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedKeys:
    """One layer's keys and values, each [slots, G·C], and the page table [B, pages] of its group, int32.

    A sequence's table row starts with the page of position `first_pages_B` · `page_size`.
    """

    keys_SD: Tensor
    values_SD: Tensor
    table: Tensor
    first_pages_B: Tensor
    page_size: int


def queries_per_tile(num_heads: int, num_kv_heads: int) -> int:
    """Return how many queries of consecutive positions one tile holds."""
    return PREFILL_ROWS // (num_heads // num_kv_heads)


def attend(q_THC: Tensor, pages: PagedKeys, work: AttentionWork, out_THC: Tensor, *, in_splits: bool) -> None:
    """Write softmax(q · k / √C) · v of each item's queries to `out_THC`; rows of no item keep what they hold.

    `in_splits` (decode) takes one query an item and spreads its keys over the device.
    """
    num_heads, head_dim = q_THC.shape[1:]
    num_kv_heads = pages.keys_SD.shape[1] // head_dim
    num_items = work.items.shape[0]
    if not num_items:
        return
    max_splits = work.max_splits if in_splits else 1
    partial = None
    if in_splits:
        partial = q_THC.new_empty((num_items, max_splits, num_heads, head_dim + 2), dtype=torch.float32)
    attend_kernel[(num_items, num_kv_heads, max_splits)](
        q_THC,
        pages.keys_SD,
        pages.values_SD,
        pages.table,
        pages.first_pages_B,
        work.items,
        out_THC,
        partial,
        pages.table.stride(0),
        max_splits,
        math.log2(math.e) / math.sqrt(head_dim),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=pages.page_size,
        FIELDS=ITEM_FIELDS,
        SPLIT=KEYS_PER_SPLIT,
        BLOCK_M=DECODE_ROWS if in_splits else PREFILL_ROWS,
        BLOCK_S=KEYS_PER_TILE,
        PRECISION=precision_of(q_THC.dtype),
        num_warps=(DECODE_ROWS if in_splits else PREFILL_ROWS) // ROWS_PER_WARP,
        num_stages=NUM_STAGES,
        enable_fp_fusion=False,
    )
    if in_splits:
        merge_splits_kernel[(num_items, num_heads)](
            partial,
            work.items,
            out_THC,
            max_splits,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            FIELDS=ITEM_FIELDS,
            SPLIT=KEYS_PER_SPLIT,
            AT_ONCE=SPLITS_AT_ONCE,
            num_warps=1,
            enable_fp_fusion=False,
        )


def attend_reference(q_THC: Tensor, pages: PagedKeys, work: AttentionWork) -> Tensor:
    """The same in float64, query by query; rows of no item are 0."""
    out_THC = torch.zeros_like(q_THC, dtype=torch.float64)
    num_heads, head_dim = q_THC.shape[1:]
    for row, position, num_queries, first_key, sequence in work.items.tolist():
        for query in range(num_queries):
            seen = torch.arange(first_key, position + query + 1, device=q_THC.device)
            pages_S = pages.table[sequence][seen // pages.page_size - pages.first_pages_B[sequence]]
            slots_S = pages_S.long() * pages.page_size + seen % pages.page_size
            k_GSC, v_GSC = (
                cache_SD[slots_S].double().view(len(seen), -1, head_dim).transpose(0, 1)
                for cache_SD in (pages.keys_SD, pages.values_SD)
            )
            q_HC = q_THC[row + query].double()
            k_HSC, v_HSC = (x_GSC.repeat_interleave(num_heads // len(x_GSC), 0) for x_GSC in (k_GSC, v_GSC))
            weights_HS = F.softmax((k_HSC @ q_HC[:, :, None])[..., 0] / math.sqrt(head_dim), dim=-1)
            out_THC[row + query] = (weights_HS[:, None] @ v_HSC)[:, 0]
    return out_THC
