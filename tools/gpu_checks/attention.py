"""Checks attention over pages against float64 and decode against prefill; times it at Scout's head counts."""

import torch

from gpu_checks.harness import Session, bench, normal, relative_error
from llama4_dist.gpu.attention import (
    KEYS_PER_SPLIT,
    AttentionWork,
    PagedKeys,
    attend,
    attend_reference,
    queries_per_tile,
)

HEADS, KV_HEADS = 40, 8


def make_pages(
    num_sequences: int, num_keys: int, head_dim: int, session: Session, dtype: torch.dtype = torch.bfloat16
) -> PagedKeys:
    """Return random keys and values, each sequence's pages strewn over the cache."""
    num_pages = -(-num_keys // 16)
    total = num_sequences * num_pages
    slots = normal(2, total * 16, KV_HEADS * head_dim, device=session.device, dtype=dtype)
    table = torch.randperm(total, device=session.device).view(num_sequences, num_pages).int()
    first_pages_B = torch.zeros(num_sequences, dtype=torch.int32, device=session.device)
    return PagedKeys(keys_SD=slots[0], values_SD=slots[1], table=table, first_pages_B=first_pages_B, page_size=16)


def check_attention(session: Session) -> None:
    """A prefill that ends at the last key, tile by tile, and each of its queries as a decode."""
    head_dim = 128 if session.is_cuda else 16
    cases = ((130, 24, 0), (1100, 30, 0), (1100, 30, 1024)) if session.is_cuda else ((70, 5, 0), (530, 2, 512))
    for dtype in (torch.float32, torch.bfloat16):
        for num_keys, num_queries, first_key in cases if dtype == torch.bfloat16 else cases[:1]:
            pages = make_pages(2, num_keys, head_dim, session, dtype)
            q_THC = normal(num_queries, HEADS, head_dim, device=session.device, dtype=dtype, scale=2.0)
            first = num_keys - num_queries
            per_tile = queries_per_tile(HEADS, KV_HEADS)
            tiles = [
                (row, first + row, min(per_tile, num_queries - row), first_key, 1)
                for row in range(0, num_queries, per_tile)
            ]
            singles = [(row, first + row, 1, first_key, 1) for row in range(num_queries)]
            prefill, decode = (
                AttentionWork(
                    items=torch.tensor(items, dtype=torch.int32, device=session.device),
                    max_splits=-(-num_keys // KEYS_PER_SPLIT),
                )
                for items in (tiles, singles)
            )
            out_THC, decoded_THC = (torch.full_like(q_THC, float("nan")) for _ in range(2))
            attend(q_THC, pages, prefill, out_THC, in_splits=False)
            attend(q_THC, pages, decode, decoded_THC, in_splits=True)
            error = relative_error(out_THC, attend_reference(q_THC, pages, prefill))
            name = f"{num_queries} queries, keys {first_key} to {num_keys}, {str(dtype)[6:]}"
            session.add(f"attention, {name}", error < (1e-5 if dtype == torch.float32 else 1e-2), error=error)
            if session.is_cuda:
                session.add(f"attention: decode is prefill, {name}", torch.equal(out_THC, decoded_THC))
            else:  # numpy chooses its products by their shape, so the interpreter says nothing of bits
                error = relative_error(decoded_THC, out_THC)
                session.add(f"attention: decode is prefill, {name}", error < 1e-2, error=error)


def time_attention(session: Session) -> None:
    for num_sequences, num_keys in ((1, 1024), (1, 8192), (1, 131072), (16, 8192), (64, 4096)):
        pages = make_pages(num_sequences, num_keys, 128, session)
        q_THC = normal(num_sequences, HEADS, 128, device=session.device)
        items = [(row, num_keys - 1, 1, 0, row) for row in range(num_sequences)]
        work = AttentionWork(
            items=torch.tensor(items, dtype=torch.int32, device=session.device),
            max_splits=-(-num_keys // KEYS_PER_SPLIT),
        )
        out_THC = torch.empty_like(q_THC)
        seconds = bench([lambda: attend(q_THC, pages, work, out_THC, in_splits=True)] * 8)
        num_bytes = 2 * num_sequences * num_keys * KV_HEADS * 128 * 2
        session.add(
            f"decode attention, {num_sequences} x {num_keys} keys",
            "measured",
            seconds=seconds,
            rate=f"{num_bytes / seconds / 1e12:.2f} TB/s",
            share=num_bytes / seconds / session.copy_rate,
        )
    num_queries = 8192
    pages = make_pages(1, num_queries, 128, session)
    q_THC = normal(num_queries, HEADS, 128, device=session.device)
    per_tile = queries_per_tile(HEADS, KV_HEADS)
    items = [(row, row, min(per_tile, num_queries - row), 0, 0) for row in range(0, num_queries, per_tile)]
    work = AttentionWork(items=torch.tensor(items, dtype=torch.int32, device=session.device), max_splits=1)
    out_THC = torch.empty_like(q_THC)
    operations = 2 * num_queries * (num_queries + 1) * HEADS * 128
    seconds = bench([lambda: attend(q_THC, pages, work, out_THC, in_splits=False)])
    _add_prefill(session, f"prefill attention, {num_queries} tokens", operations, seconds)
    q_1HTC = q_THC.transpose(0, 1)[None]
    k_1HTC, v_1HTC = (x.view(1, num_queries, KV_HEADS, 128).transpose(1, 2) for x in (pages.keys_SD, pages.values_SD))
    seconds = bench(
        [
            lambda: torch.nn.functional.scaled_dot_product_attention(
                q_1HTC, k_1HTC, v_1HTC, is_causal=True, enable_gqa=True
            )
        ]
    )
    _add_prefill(session, f"torch SDPA, dense keys, {num_queries} tokens", operations, seconds)


def _add_prefill(session: Session, name: str, operations: int, seconds: float) -> None:
    session.add(
        name,
        "measured",
        seconds=seconds,
        rate=f"{operations / seconds / 1e12:.0f} TFLOP/s",
        share=operations / seconds / session.matrix_rate,
    )
